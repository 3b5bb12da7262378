#include "cpu/sddmm.h"

#include <cstring>

#include "cpu/edge/edge.h"

namespace fastsparse::edge {

Tensor sddmm(const Tensor& x, const Tensor& weight, const Tensor& indices, const std::optional<Tensor>& offsets) {
  InFloatMode mode(Subnormals::as_asked);
  int64_t N = x.size(0), D = x.size(1), size = int64_t(x.element_size());
  Tensor codes = as_contiguous(indices, ScalarType::Long), rows = with_unit_stride(x), atoms = with_unit_stride(weight);
  check_indices("sddmm", codes, weight.size(0));
  SddmmArgs args{rows.const_data_ptr(), atoms.const_data_ptr(), codes.const_data_ptr<int64_t>(), nullptr, nullptr,
                 N, 0, D, rows.stride(0), atoms.stride(0), dtype_of(x)};
  if (offsets) {
    Tensor bounds = torch::stable::contiguous(*offsets), out = allocate({codes.numel()}, x.scalar_type());
    check_offsets("sddmm", bounds, codes);
    args.offsets = bounds.const_data_ptr<int64_t>();
    args.out = out.mutable_data_ptr();
    int64_t entries = args.offsets[N], padding = codes.numel() - entries;
    parallel(entries, entries_a_task(D * size), FASTSPARSE_KERNEL(sddmm_ragged), args);
    if (padding > 0) std::memset(static_cast<char*>(args.out) + entries * size, 0, size_t(padding * size));
    return out;
  }
  args.k = codes.size(1);
  Tensor out = allocate({N, args.k}, x.scalar_type());
  args.out = out.mutable_data_ptr();
  parallel(N, rows_a_task(args.k * D * size), FASTSPARSE_KERNEL(sddmm), args);
  return out;
}

FASTSPARSE_REGISTER(fastsparse, CPU, sddmm)

}  // namespace fastsparse::edge
