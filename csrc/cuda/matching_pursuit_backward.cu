#include "cuda/matching_pursuit_backward.cuh"

#include <algorithm>
#include <bit>

#include "cuda/edge.h"
#include "cuda/knobs.h"
#include "cuda/norms.h"
#include "cuda/rows.h"
#include "cuda/sort.h"

namespace fastsparse::cuda {

namespace {

// Scratch memory for one chunk of tokens, of one token at least: about what L2 holds, and enough rows to fill the machine.
constexpr int64_t kScratchBytes = int64_t{64} << 20;

template <typename T> class Backward {
  using C = Accumulator<T>;

 public:
  Backward(const Tensor& values, const Tensor& indices, const Tensor& residual, const Tensor& dictionary,
           const Tensor& d_values, const std::optional<Tensor>& d_residual, bool normalized, bool needs_x,
           bool needs_dictionary)
      : call_(residual),
        values_(values),
        indices_(indices),
        d_values_(d_values),
        residual_(with_unit_stride(residual)),
        dictionary_(with_unit_stride(dictionary)),
        N_(residual.size(0)),
        D_(residual.size(1)),
        M_(dictionary.size(0)),
        k_(values.size(1)),
        d_x_(needs_x ? allocate(residual, {N_, D_}, residual.scalar_type())
                     : allocate(residual, {0}, residual.scalar_type())) {
    check_indices(call_, "matching_pursuit_backward", indices, M_);
    if (d_residual) d_residual_ = with_unit_stride(*d_residual);
    if (!normalized) squares_ = squared_norms(call_, dictionary_);
    if (needs_dictionary) {
      sums_ = allocate(dictionary, {M_, D_}, accumulator_of(dictionary.scalar_type()));
      torch::stable::zero_(*sums_);
    }
    packets_ = takes_packets<T>(residual_, D_) && takes_packets<T>(dictionary_, D_) &&
               (!d_residual_ || takes_packets<T>(*d_residual_, D_));
  }

  std::tuple<Tensor, Tensor> run() {
    if (N_ > 0 && D_ > 0 && (d_x_.numel() > 0 || sums_)) {
      bool held = D_ <= int64_t{kBackThreads} * (packets_ ? held_columns<Packet<T>::size> : held_columns<1>);
      int64_t columns = D_ * ((sums_ ? k_ : 0) + (held ? 0 : 2));  // of accumulators, for a token
      int64_t most = (knobs.bytes ? knobs.bytes : kScratchBytes) / std::max<int64_t>(1, columns * int64_t(sizeof(C)));
      tokens_ = columns == 0 ? N_ : std::clamp<int64_t>(most, 1, N_);
      if (sums_) contributions_ = allocate(sums_.value(), {tokens_ * k_, D_}, sums_->scalar_type());
      if (!held) carried_ = allocate(residual_, {tokens_ * D_, 2}, accumulator_of(residual_.scalar_type()));
      int bits = std::bit_width(uint64_t(M_)) + std::bit_width(uint64_t((N_ - 1) / tokens_));
      if (bits <= 32 && N_ * k_ <= int64_t{1} << 32) chunks<uint32_t>(ScalarType::Int, bits);
      else chunks<uint64_t>(ScalarType::Long, bits);
    }
    Tensor none = allocate(dictionary_, {0}, dictionary_.scalar_type());
    return {d_x_, sums_ ? as_contiguous(*sums_, dictionary_.scalar_type()) : none};
  }

 private:
  template <int Width> static constexpr int64_t held_columns = int64_t{Width} * kHeldPackets<T, Width>;

  template <typename Word> void chunks(ScalarType word, int bits) {
    const bool sums = sums_ && k_ > 0;
    const int atom_bits = std::bit_width(uint64_t(M_));
    std::optional<Pairs> sorted;
    if (sums) {
      int64_t steps = N_ * k_;
      Pairs pairs{allocate(residual_, {steps}, word), allocate(residual_, {steps}, word)};
      call_.launch("pursuit_pairs", pursuit_pairs<T, Word>, blocks(steps, kGatherBlock), kGatherBlock, 0,
                   data<T>(values_), data<int64_t>(indices_), mutable_data<Word>(pairs.keys),
                   mutable_data<Word>(pairs.values), steps, k_, M_, tokens_, atom_bits, values_.stride(0),
                   values_.stride(1), indices_.stride(0), indices_.stride(1));
      sorted = sort_pairs(call_, pairs, bits);
    }
    std::optional<Tensor> partials;
    if (sums) partials = allocate(*sums_, {(tokens_ * k_ >> kTileBits) + 1, D_}, sums_->scalar_type());
    for (int64_t first = 0; first < N_; first += tokens_) {
      int64_t tokens = std::min(tokens_, N_ - first);
      back(first, tokens);
      if (!sums) continue;
      int64_t begin = first * k_;
      Chunk<Word> chunk{data<Word>(sorted->keys) + begin, data<Word>(sorted->values) + begin, begin, tokens * k_, M_,
                        atom_bits};
      if (D_ % Packet<C>::size == 0) reduce<Packet<C>::size>(chunk, *partials);
      else reduce<1>(chunk, *partials);
    }
  }

  void back(int64_t first, int64_t tokens) {
    Pursued<T> pursued{};
    pursued.values = data<T>(values_);
    pursued.indices = data<int64_t>(indices_);
    pursued.d_values = data<T>(d_values_);
    pursued.residual = data<T>(residual_);
    pursued.dictionary = data<T>(dictionary_);
    if (d_residual_) pursued.d_residual = data<T>(*d_residual_), pursued.d_residual_row = d_residual_->stride(0);
    if (squares_) pursued.squares = data<double>(*squares_);
    if (d_x_.numel() > 0) pursued.d_x = mutable_data<T>(d_x_);
    if (contributions_) pursued.contributions = mutable_data<C>(*contributions_);
    if (carried_) pursued.carried = static_cast<Carried<C, 1>*>(carried_->mutable_data_ptr());
    pursued.first = first, pursued.k = k_, pursued.D = D_;
    pursued.value_row = values_.stride(0), pursued.value_column = values_.stride(1);
    pursued.index_row = indices_.stride(0), pursued.index_column = indices_.stride(1);
    pursued.d_value_row = d_values_.stride(0), pursued.d_value_column = d_values_.stride(1);
    pursued.residual_row = residual_.stride(0), pursued.dictionary_row = dictionary_.stride(0);

    auto launch = [&](auto kernel, int64_t columns_a_thread) {
      int64_t warps = (D_ + columns_a_thread * kWarp - 1) / (columns_a_thread * kWarp);
      unsigned threads = unsigned(std::min<int64_t>(warps * kWarp, kBackThreads));
      call_.launch("pursuit_back", kernel, unsigned(tokens), threads, 0, pursued);
    };
    constexpr int width = Packet<T>::size;
    if (carried_) launch(pursuit_back<T, 1, 0>, 1);
    else if (packets_) launch(pursuit_back<T, width, kHeldPackets<T, width>>, held_columns<width>);
    else launch(pursuit_back<T, 1, kHeldPackets<T, 1>>, held_columns<1>);
  }

  template <int Width, typename Word> void reduce(const Chunk<Word>& chunk, const Tensor& partials) {
    Panels panels = Panels::of(D_, Width);
    unsigned per_panel = panels.blocks(chunk.steps, kGatherBlock);
    call_.launch("pursuit_reduce", pursuit_reduce<C, Width, Word>, unsigned(panels.count) * per_panel, kGatherBlock, 0,
                 chunk, data<C>(*contributions_), mutable_data<C>(*sums_), mutable_data<C>(partials), D_, per_panel,
                 panels.lane_bits);
    unsigned wide = blocks(D_, kGatherBlock);
    call_.launch("pursuit_join", pursuit_join<C, Word>, unsigned((chunk.steps - 1) >> kTileBits) * wide, kGatherBlock, 0,
                 chunk, data<C>(partials), mutable_data<C>(*sums_), D_, wide);
  }

  static unsigned blocks(int64_t items, int64_t a_block) { return unsigned((items + a_block - 1) / a_block); }

  Call call_;
  Tensor values_, indices_, d_values_, residual_, dictionary_;
  int64_t N_, D_, M_, k_, tokens_ = 1;
  Tensor d_x_;
  bool packets_ = false;
  std::optional<Tensor> d_residual_, squares_, sums_, contributions_, carried_;
};

}  // namespace

std::tuple<Tensor, Tensor> matching_pursuit_backward(const Tensor& values, const Tensor& indices,
                                                     const Tensor& residual, const Tensor& dictionary,
                                                     const Tensor& d_values, const std::optional<Tensor>& d_residual,
                                                     bool normalized, bool needs_x, bool needs_dictionary) {
  return with_type(dtype_of(residual), [&](auto tag) {
    using T = typename decltype(tag)::type;
    return Backward<T>(values, indices, residual, dictionary, d_values, d_residual, normalized, needs_x,
                       needs_dictionary)
        .run();
  });
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, matching_pursuit_backward)

}  // namespace fastsparse::cuda
