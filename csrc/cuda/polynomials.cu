#include "cuda/polynomials.cuh"

#include <tuple>

#include "cuda/edge.h"
#include "cuda/rows.h"

#define FASTSPARSE_POLYNOMIAL_OP(op) FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, op)

namespace fastsparse::cuda {

#include "polynomial_ops.h"

namespace {

// Calls f.operator()<T, Kind, Width>(), Width being that of packets, where all rows are whole ones, or 1.
template <typename F>
void with_kind(PolynomialKind kind, const Tensor& x, std::initializer_list<const Tensor*> all, const F& f) {
  with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool packets = true;
    for (const Tensor* rows : all) packets = packets && (rows->dim() < 2 || takes_packets<T>(*rows, rows->size(1)));
    auto of = [&]<typename Kind>() {
      if (packets) f.template operator()<T, Kind, Packet<T>::size>();
      else f.template operator()<T, Kind, 1>();
    };
    if (kind == PolynomialKind::norm) of.template operator()<PolyNorm>();
    else of.template operator()<PolyRelu>();
  });
}

unsigned blocks_of(int64_t rows, int64_t each) { return unsigned((rows + each - 1) / each); }

}  // namespace

Tensor polynomial(PolynomialKind kind, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  Call call(x);
  const ScalarType dtype = x.scalar_type();
  const int64_t N = x.size(0), D = x.size(1);
  Tensor from = with_unit_stride(x), weights = as_contiguous(weight, dtype), constant = as_contiguous(bias, dtype);
  Tensor y = allocate(x, {N, D}, dtype);
  if (D == 0) return y;
  with_kind(kind, x, {&from, &y}, [&]<typename T, typename Kind, int Width>() {
    PolynomialRows<T> rows{};
    rows.x = data<T>(from), rows.x_stride = from.stride(0);
    rows.weight = data<T>(weights), rows.bias = data<T>(constant);
    rows.out = mutable_data<T>(y);
    rows.N = N, rows.D = D, rows.eps = Accumulator<T>(eps), rows.inverse_D = 1 / Accumulator<T>(D);
    call.launch("polynomial_forward", polynomial_forward<T, Kind, Width>, blocks_of(N, kPolynomialWarps),
                kPolynomialThreads, 0, rows);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> polynomial_backward(PolynomialKind kind, const Tensor& x, const Tensor& weight,
                                                       double eps, const Tensor& d_y, bool needs_x,
                                                       bool needs_parameters) {
  Call call(x);
  const ScalarType dtype = x.scalar_type();
  const int64_t N = x.size(0), D = x.size(1);
  const unsigned blocks = D > 0 ? blocks_of(N, kPolynomialRows) : 0;
  auto output = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return needed ? allocate(x, sizes, dtype) : allocate(x, {0}, dtype);
  };
  Tensor d_x = output(needs_x, {N, D}), d_weight = output(needs_parameters, {kPowers});
  Tensor d_bias = output(needs_parameters, {1});
  if (!needs_x && !needs_parameters) return {d_x, d_weight, d_bias};

  Tensor from = with_unit_stride(x), upstream = with_unit_stride(d_y), weights = as_contiguous(weight, dtype);
  Tensor sums = allocate(x, {needs_parameters ? int64_t(blocks) : 0, kPowers + 1}, accumulator_of(dtype));
  with_kind(kind, x, {&from, &upstream, &d_x}, [&]<typename T, typename Kind, int Width>() {
    using C = Accumulator<T>;
    PolynomialRows<T> rows{};
    rows.x = data<T>(from), rows.x_stride = from.stride(0);
    rows.d_y = data<T>(upstream), rows.d_y_stride = upstream.stride(0);
    rows.weight = data<T>(weights);
    if (needs_x) rows.out = mutable_data<T>(d_x);
    if (needs_parameters) rows.sums = mutable_data<C>(sums);
    rows.N = N, rows.D = D, rows.eps = C(eps), rows.inverse_D = 1 / C(D);
    call.launch("polynomial_back", polynomial_back<T, Kind, Width>, blocks, kPolynomialThreads, 0, rows);
    if (needs_parameters)
      call.launch("polynomial_parameters", polynomial_parameters<T>, 1, kWarp * (kPowers + 1), 0, data<C>(sums),
                  mutable_data<T>(d_weight), mutable_data<T>(d_bias), int64_t(blocks));
  });
  return {d_x, d_weight, d_bias};
}

}  // namespace fastsparse::cuda
