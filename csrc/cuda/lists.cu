#include "cuda/lists.h"

namespace fastsparse::cuda {

namespace {

// How long the pieces of hot lists are: 256 terms at least (32 waits for memory one after another, some 20 us), and
// more where there would be over 8192 of them: so the partial sums take no more than 2 * 8192 rows, 64 kB * D.
int split_bits_of(int64_t terms) {
  int bits = 8;
  while (terms >> bits > 8192) ++bits;
  return bits;
}

template <typename T> void run(const Call& call, const ListMemory& memory, const Tensor& rows, const Tensor& out) {
  using C = Accumulator<T>;
  RowLists<C> lists = memory.of<C>();
  int64_t D = out.size(1), pieces = lists.marks + lists.count;
  Tensor partials = allocate(out, {2 * lists.marks, D}, accumulator_of(out.scalar_type()));

  auto gather = [&]<int Width>() {
    int most = most_lane_bits(memory.terms(), rows.size(0), D * sizeof(T), Width * sizeof(T));
    Panels panels = Panels::of(D, Width, most);
    unsigned per_panel = panels.blocks(pieces, kGatherBlock);
    call.launch("lists_gather", lists_gather<T, Width>, unsigned(panels.count) * per_panel, kGatherBlock, 0, lists,
                data<T>(rows), mutable_data<T>(out), mutable_data<C>(partials), D, per_panel, panels.lane_bits);
  };
  if (D == 1)
    call.launch("lists_column", lists_column<T>, gather_blocks(pieces << kLeastLaneBits), kGatherBlock, 0, lists,
                data<T>(rows), mutable_data<T>(out), mutable_data<C>(partials));
  else if (takes_packets<T>(rows, D)) gather.template operator()<Packet<T>::size>();
  else gather.template operator()<1>();
  unsigned panels = gather_blocks((D + kJoined - 1) / kJoined);
  call.launch("lists_join", lists_join<T>, unsigned(lists.marks) * panels, kGatherBlock, 0, lists, data<C>(partials),
              mutable_data<T>(out), D, panels);
}

}  // namespace

ListMemory::ListMemory(const Tensor& like, int64_t count, int64_t terms)
    : split_bits_(split_bits_of(terms)),
      terms_(allocate(like, {terms, 16}, ScalarType::Byte)),
      ranges_(allocate(like, {count, 2}, ScalarType::Long)),
      marked_(allocate(like, {terms >> split_bits_}, ScalarType::Long)) {}

void sum_lists(const Call& call, const ListMemory& memory, const Tensor& rows, const Tensor& out) {
  with_type(dtype_of(out), [&](auto tag) { run<typename decltype(tag)::type>(call, memory, rows, out); });
}

}  // namespace fastsparse::cuda
