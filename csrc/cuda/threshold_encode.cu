#include "cuda/threshold_encode.cuh"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/edge.h"
#include "cuda/rows.h"
#include "cuda/stripes.h"

namespace fastsparse::cuda {

namespace {

// Room for entries where nobody says how many there will be: for a 32nd of all scores, within limits. A call that needs
// more is made again, with as much as that.
constexpr int64_t kShare = 32, kLeastRoom = int64_t{1} << 16, kMostRoom = int64_t{1} << 26;
constexpr int kThreads = 256;

// The running sum (count) of whole numbers (...), in int64.
Tensor running_sum(const Tensor& numbers) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(numbers), from(int64_t{0}), from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// One call for tensors of one type.
template <typename T> class Encoder {
  using C = Accumulator<T>;

 public:
  Encoder(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& threshold,
          bool absolute, const std::optional<Tensor>& mask, const std::optional<int64_t>& max_entries)
      : call_(x), x_(x), weight_(weight), N_(x.size(0)), M_(weight.size(0)), max_entries_(max_entries) {
    if (max_entries && *max_entries < 0)
      throw std::invalid_argument("threshold_encode: max_entries must be at least 0, got max_entries=" +
                                  std::to_string(*max_entries));
    if (M_ >= std::numeric_limits<int32_t>::max() - 4096)
      throw std::invalid_argument("threshold_encode: weight must have fewer than 2^31 - 4096 rows, got " +
                                  std::to_string(M_));
    if (N_ * M_ == 0) return;
    prepare(bias, threshold, absolute, mask);
    plan();
  }

  std::tuple<Tensor, Tensor, Tensor> run() {
    if (N_ * M_ == 0) return nothing();
    int64_t all = N_ * M_;
    append(std::min(all, max_entries_.value_or(std::clamp(all / kShare, kLeastRoom, kMostRoom))));
    if (max_entries_) {
      auto code = arranged(*max_entries_);
      int64_t entries = call_.capturing() ? 0 : total();
      if (entries > *max_entries_)
        throw std::runtime_error("threshold_encode: max_entries must be at least the number of entries (" +
                                 std::to_string(entries) + "), got max_entries=" + std::to_string(*max_entries_));
      return code;
    }
    int64_t entries = total();
    if (entries > room_) append(entries);
    return arranged(entries);
  }

 private:
  Tensor scratch(int64_t count, ScalarType dtype) const { return allocate(x_, {count}, dtype); }
  static constexpr ScalarType accumulator() { return sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float; }
  int64_t blocks(int64_t threads) const { return ceil_div(threads, kThreads); }

  std::tuple<Tensor, Tensor, Tensor> nothing() const {
    int64_t entries = max_entries_.value_or(0);
    std::tuple code{scratch(entries, accumulator()), scratch(entries, ScalarType::Long),
                    scratch(N_ + 1, ScalarType::Long)};
    std::apply([](auto&... parts) { (torch::stable::zero_(parts), ...); }, code);
    return code;
  }

  void prepare(const std::optional<Tensor>& bias, const Tensor& threshold, bool absolute,
               const std::optional<Tensor>& mask) {
    int64_t padded = round_up(M_, kGroup<C>);
    bias_ = scratch(padded, accumulator());
    threshold_ = scratch(padded, accumulator());
    eligible_ = scratch(padded, ScalarType::Byte);
    criteria_ = {data<C>(*bias_), data<C>(*threshold_), data<uint8_t>(*eligible_), absolute};
    auto pointer = [](const std::optional<Tensor>& vector) { return vector ? vector->const_data_ptr() : nullptr; };
    auto stride = [](const std::optional<Tensor>& vector) { return vector ? vector->stride(0) : 0; };
    call_.launch("threshold_encode_prepare", threshold_encode_prepare<T>, blocks(padded), kThreads, 0,
                 static_cast<const T*>(pointer(bias)), stride(bias), data<C>(threshold), threshold.stride(0),
                 static_cast<const uint8_t*>(pointer(mask)), stride(mask), M_, padded, mutable_data<C>(*bias_),
                 mutable_data<C>(*threshold_), mutable_data<uint8_t>(*eligible_));
  }

  // Rows and latents to take at a time, and scratch for them.
  void plan() {
    rows_ = block_rows(N_, kMostRows);
    stripe_ = stripe_latents<C>(call_, rows_, M_, kGroup<C>);
    splits_ = stripe_splits(call_, rows_, stripe_);
    parts_ = ceil_div(M_, stripe_) * splits_;
    scores_ = scratch(rows_ * stripe_, accumulator());
    words_ = scratch(rows_ * stripe_ / kWarp, ScalarType::Int);
    marked_ = scratch(mark_blocks(rows_), ScalarType::Int);
    counts_ = scratch(N_ * parts_, ScalarType::Int);
    starts_ = scratch(N_ * parts_, ScalarType::Long);
    totals_ = scratch(ceil_div(N_, rows_) * ceil_div(M_, stripe_), ScalarType::Long);
  }

  int64_t mark_blocks(int64_t rows) const { return ceil_div(rows * splits_, kMarkWarps); }

  // All entries, or of more than there is room for the first, and how many every part has.
  void append(int64_t room) {
    room_ = room;
    values_.reset();
    latents_.reset();
    values_ = scratch(room, accumulator());
    latents_ = scratch(room, ScalarType::Int);
    Marks marks{mutable_data<uint32_t>(*words_), mutable_data<int32_t>(*marked_)};
    Appended<C> appended{mutable_data<C>(*values_), mutable_data<int32_t>(*latents_), room, nullptr,
                         mutable_data<int64_t>(*totals_)};
    for (int64_t n = 0; n < N_; n += rows_) {
      int64_t rows = std::min(rows_, N_ - n), blocks = mark_blocks(rows);
      Tensor tokens = rows_of(x_, n, rows);
      Parts parts = parts_from(n);
      parts.rows = int(rows);
      for (int64_t m = 0; m < M_; m += stripe_, parts.first += parts.splits) {
        int64_t count = std::min(stripe_, M_ - m);
        product(tokens, rows_of(weight_, m, count), scores_of(*scores_, rows, count, stripe_));
        Stripe<C> stripe{data<C>(*scores_), stripe_, int(m), int(count)};
        call_.launch("threshold_encode_mark", threshold_encode_mark<C>, blocks, kMarkThreads, 0, stripe, criteria_,
                     parts, marks);
        call_.launch("threshold_encode_append", threshold_encode_append<C>, blocks, kMarkThreads, 0, stripe, criteria_,
                     parts, marks, appended);
        appended.before = appended.after++;
      }
    }
    ends_ = running_sum(*counts_);
  }

  Parts parts_from(int64_t row) const {
    return {mutable_data<int32_t>(*counts_) + row * parts_, mutable_data<int64_t>(*starts_) + row * parts_, parts_, 0,
            int(splits_), 0};
  }

  // How many entries there are: this waits for the device.
  int64_t total() const {
    torch::stable::Device host(torch::headeronly::DeviceType::CPU);
    return *torch::stable::to(rows_of(*ends_, N_ * parts_ - 1, 1), host).const_data_ptr<int64_t>();
  }

  // The result, of so many entries.
  std::tuple<Tensor, Tensor, Tensor> arranged(int64_t entries) {
    Tensor values = scratch(entries, accumulator()), indices = scratch(entries, ScalarType::Long);
    Tensor offsets = scratch(N_ + 1, ScalarType::Long);
    Code<C> code{mutable_data<C>(values), mutable_data<int64_t>(indices), mutable_data<int64_t>(offsets), entries};
    Appended<C> appended{mutable_data<C>(*values_), mutable_data<int32_t>(*latents_), room_, nullptr, nullptr};
    const int64_t* ends = data<int64_t>(*ends_);
    call_.launch("threshold_encode_move", threshold_encode_move<C>, ceil_div(N_ * ceil_div(parts_, kWarp), kMarkWarps),
                 kMarkThreads, 0, parts_from(0), ends, N_, appended, code);
    call_.launch("threshold_encode_finish", threshold_encode_finish<C>, blocks(std::max(N_ + 1, entries)), kThreads, 0,
                 ends, N_, parts_, code);
    return {values, indices, offsets};
  }

  Call call_;
  Tensor x_, weight_;
  int64_t N_, M_, rows_ = 0, stripe_ = 0, splits_ = 1, parts_ = 0, room_ = 0;
  std::optional<int64_t> max_entries_;
  Criteria<C> criteria_{};
  std::optional<Tensor> bias_, threshold_, eligible_, scores_, words_, marked_, counts_, starts_, totals_, ends_;
  std::optional<Tensor> values_, latents_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> threshold_encode(const Tensor& x, const Tensor& weight,
                                                    const std::optional<Tensor>& bias, const Tensor& threshold,
                                                    bool absolute, const std::optional<Tensor>& latent_mask,
                                                    std::optional<int64_t> max_entries) {
  return with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    return Encoder<T>(x, weight, bias, threshold, absolute, latent_mask, max_entries).run();
  });
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, threshold_encode)

}  // namespace fastsparse::cuda
