#include "cpu/threshold_encode.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/edge/knobs.h"
#include "cpu/edge/scorer.h"

namespace fastsparse::edge {

namespace {

// A screen's product takes half the time of an exact one, and scoring an entry alone ten times that of one in a
// product: stripes with more than one in so many are better scored exactly at once.
constexpr int64_t kScreened = 24;
constexpr int64_t kTried = 1024;                 // latents of the first stripe, which is in vain where it is too dense
constexpr int64_t kUnasked = int64_t{64} << 20;  // bytes of entries, after which to ask again how much memory there is

// What comes out of a block of rows and a stripe of latents.
struct Part {
  int64_t row, latent;                 // the first
  std::vector<int64_t> offsets;        // where each row's entries begin
  std::unique_ptr<int32_t[]> latents;  // from the first on
  std::unique_ptr<char[]> scores;      // of the accumulation type
};

// From how many entries rows have to where they begin; returns how many there are.
int64_t add_up(const std::vector<int64_t>& counts, std::vector<int64_t>& offsets) {
  offsets.assign(counts.size() + 1, 0);
  for (size_t n = 0; n < counts.size(); ++n) offsets[n + 1] = offsets[n] + counts[n];
  return offsets.back();
}

// How much memory could be had now, as far as the system says.
int64_t free_bytes() {
  if (knobs.free_bytes >= 0) return knobs.free_bytes;
  std::ifstream file("/proc/meminfo");
  std::string name;
  for (int64_t kilobytes; file >> name;)
    if (name == "MemAvailable:" && file >> kilobytes) return kilobytes << 10;
  return std::numeric_limits<int64_t>::max();
}

void check_thresholds(const Tensor& thresholds) {
  auto check = [&](const auto* value) {
    for (int64_t m = 0; m < thresholds.numel(); ++m)
      if (value[m] != value[m])
        throw std::invalid_argument("threshold_encode: threshold must not be NaN, got it at [" + std::to_string(m) +
                                    "]");
  };
  if (thresholds.scalar_type() == ScalarType::Double) check(thresholds.const_data_ptr<double>());
  else check(thresholds.const_data_ptr<float>());
}

class Encoder {
 public:
  Encoder(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& threshold,
          bool absolute, const std::optional<Tensor>& latent_mask, std::optional<int64_t> max_entries)
      : x_(with_unit_stride(x)), scorer_(weight, latent_mask, 0), absolute_(absolute), max_entries_(max_entries),
        N_(x.size(0)), rows_{x_.const_data_ptr(), nullptr, x_.stride(0), x_.size(1), dtype_of(x_)},
        accumulator_(accumulator_of(x.scalar_type())), number_bytes_(accumulator_ == ScalarType::Double ? 8 : 4),
        screened_(screens(rows_.dtype, N_, rows_.D, scorer_.latents(), 1)) {
    Tensor thresholds = torch::stable::contiguous(threshold);
    check_thresholds(thresholds);
    scorer_.add_terms(bias, std::nullopt);
    bounds_ = static_cast<char*>(scorer_.per_latent(thresholds, bounds_memory_));
  }

  std::tuple<Tensor, Tensor, Tensor> run() {
    for (int64_t n = 0; n < N_; n += kMaxRows) encode(n, std::min(kMaxRows, N_ - n));
    if (max_entries_ && total_ > *max_entries_)
      throw std::runtime_error("threshold_encode: max_entries must be at least the number of entries (" +
                               std::to_string(total_) + "), got max_entries=" + std::to_string(*max_entries_));
    return result();
  }

 private:
  // Rows [first, first + count): by a screen, up to the first stripe that is too dense for one, if there is any in all.
  void encode(int64_t first, int64_t count) {
    Rows x = rows_;
    x.data = static_cast<const char*>(x.data) + first * x.stride * int64_t(x_.element_size());
    counts_.resize(count);
    int64_t from = 0;
    if (screened_) {
      scorer_.screen(x, count);
      Stripe stripe;
      for (int64_t most = first ? scorer_.latents() : kTried; screened_ && scorer_.next(stripe, most);
           most = scorer_.latents())
        screened_ = screen(stripe, x, first);
      if (screened_) return;
      from = stripe.begin;
    }
    scorer_.plain(x, count, count == N_ ? &x_ : nullptr, from);
    for (Stripe stripe; scorer_.next(stripe);) {
      Bounds bounds = bounds_of(stripe);
      this->count(stripe, bounds);
      if (Part* part = add_part(first, stripe.begin))
        parallel(count, 8, FASTSPARSE_KERNEL(threshold_encode_list), stripe, bounds,
                 Listed{part->offsets.data(), counts_.data(), part->latents.get(), part->scores.get()});
    }
  }

  // One stripe; false, and nothing done, where that pays less than exact scores.
  bool screen(const Stripe& stripe, const Rows& x, int64_t first) {
    int64_t rows = int64_t(counts_.size());
    Bounds bounds = bounds_of(stripe);
    count(stripe, bounds);
    int64_t candidates = add_up(counts_, offsets_);
    if (candidates * kScreened > rows * stripe.count && knobs.screening < 1) return false;
    Listed listed{offsets_.data(), counts_.data(), latents_memory_.get<int32_t>(candidates),
                  scores_memory_.get<float>(candidates)};
    parallel(rows, 8, FASTSPARSE_KERNEL(threshold_encode_list), stripe, bounds, listed);
    RefineArgs args{rows, x, scorer_.weight(stripe.begin), static_cast<const float*>(stripe.bias), nullptr};
    // Each task reads all rows' lists to find its own latents, so few tasks; more than threads, for balance.
    int64_t tasks = 4 * int64_t(torch::stable::get_num_threads());
    int64_t latents = (stripe.count + tasks - 1) / tasks;
    parallel(stripe.count, latents, FASTSPARSE_KERNEL(threshold_encode_refine), listed, args);
    parallel(rows, 16, FASTSPARSE_KERNEL(threshold_encode_keep), bounds, listed);
    if (Part* part = add_part(first, stripe.begin))
      parallel(rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          int64_t from = offsets_[n], to = part->offsets[n], entries = counts_[n];
          std::copy_n(listed.latents + from, entries, part->latents.get() + to);
          std::copy_n(static_cast<const char*>(listed.scores) + from * number_bytes_, entries * number_bytes_,
                      part->scores.get() + to * number_bytes_);
        }
      });
    return true;
  }

  Bounds bounds_of(const Stripe& stripe) const {
    return {bounds_ + stripe.begin * number_bytes_, absolute_, number_bytes_ == 8 ? DType::f64 : DType::f32};
  }

  void count(const Stripe& stripe, const Bounds& bounds) {
    parallel(int64_t(counts_.size()), 8, FASTSPARSE_KERNEL(threshold_encode_count), stripe, bounds,
             Listed{nullptr, counts_.data(), nullptr, nullptr});
  }

  // Room for as many entries as counted; none where there are more than may come out, and only their number matters.
  Part* add_part(int64_t row, int64_t latent) {
    Part part{row, latent, {}, {}, {}};
    int64_t entries = add_up(counts_, part.offsets);
    total_ += entries;
    if (max_entries_ && total_ > *max_entries_) {
      parts_.clear();
      return nullptr;
    }
    check_memory(entries);
    part.latents.reset(new int32_t[entries]);
    part.scores.reset(new char[entries * number_bytes_]);
    return &parts_.emplace_back(std::move(part));
  }

  // All that has come out will be there twice in the end, here and in the result.
  void check_memory(int64_t more) {
    int64_t result = total_ * (number_bytes_ + 8);
    if (result < asked_ + kUnasked) return;
    asked_ = result;
    int64_t needed = result + more * (number_bytes_ + 4), free = free_bytes();
    if (needed <= free) return;
    char text[160];
    std::snprintf(text, sizeof text, "%lld entries so far need %.3g GiB, more than the %.3g GiB that are free; ",
                  static_cast<long long>(total_), double(needed) / 0x1p30, double(free) / 0x1p30);
    throw std::runtime_error(std::string("threshold_encode: ") + text + "raise the threshold or give max_entries");
  }

  std::tuple<Tensor, Tensor, Tensor> result() {
    Tensor bounds = allocate({N_ + 1}, ScalarType::Long);
    int64_t* offsets = bounds.mutable_data_ptr<int64_t>();
    std::fill_n(offsets, N_ + 1, 0);
    for (const Part& part : parts_)
      for (size_t n = 0; n + 1 < part.offsets.size(); ++n)
        offsets[part.row + int64_t(n) + 1] += part.offsets[n + 1] - part.offsets[n];
    for (int64_t n = 0; n < N_; ++n) offsets[n + 1] += offsets[n];

    int64_t E = max_entries_.value_or(total_);
    Tensor values = allocate({E}, accumulator_), indices = allocate({E}, ScalarType::Long);
    char* value = static_cast<char*>(values.mutable_data_ptr());
    int64_t* index = indices.mutable_data_ptr<int64_t>();
    prefer_huge_pages(value, size_t(E * number_bytes_));
    prefer_huge_pages(index, size_t(E) * sizeof *index);
    std::fill(value + total_ * number_bytes_, value + E * number_bytes_, 0);
    std::fill(index + total_, index + E, 0);
    std::vector<int64_t> places(offsets, offsets + N_);
    const int64_t* eligible = scorer_.eligible();
    for (const Part& part : parts_)  // a row's latents ascend from part to part
      parallel(int64_t(part.offsets.size()) - 1, 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          int64_t from = part.offsets[n], entries = part.offsets[n + 1] - from, &place = places[part.row + n];
          std::copy_n(part.scores.get() + from * number_bytes_, entries * number_bytes_, value + place * number_bytes_);
          for (int64_t i = 0; i < entries; ++i) {
            int64_t position = part.latent + part.latents[from + i];
            index[place + i] = eligible ? eligible[position] : position;
          }
          place += entries;
        }
      });
    return {values, indices, bounds};
  }

  Tensor x_;
  Scorer scorer_;
  bool absolute_;
  std::optional<int64_t> max_entries_;
  int64_t N_;
  Rows rows_;
  ScalarType accumulator_;
  int64_t number_bytes_;
  bool screened_;
  Scratch bounds_memory_, latents_memory_, scores_memory_;
  char* bounds_ = nullptr;                 // by eligible latent
  std::vector<int64_t> counts_, offsets_;  // of the stripe at hand
  std::vector<Part> parts_;
  int64_t total_ = 0, asked_ = 0;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> threshold_encode(const Tensor& x, const Tensor& weight,
                                                    const std::optional<Tensor>& bias, const Tensor& threshold,
                                                    bool absolute, const std::optional<Tensor>& latent_mask,
                                                    std::optional<int64_t> max_entries) {
  InFloatMode mode(Subnormals::kept);
  return Encoder(x, weight, bias, threshold, absolute, latent_mask, max_entries).run();
}

FASTSPARSE_REGISTER(fastsparse, CPU, threshold_encode)

}  // namespace fastsparse::edge
