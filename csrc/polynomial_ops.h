// The ops of polynomial activations: which polynomial they are of.
//
// Included inside of a backend's namespace, whose ops they become by what FASTSPARSE_POLYNOMIAL_OP(op) is there: hence no
// guard, and no includes.

// (N, D), of x (N, D), weight (3) and bias (1).
Tensor polynomial(PolynomialKind kind, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps);

// The gradients of x, weight and bias; those that aren't needed are empty, of shape (0,).
std::tuple<Tensor, Tensor, Tensor> polynomial_backward(PolynomialKind kind, const Tensor& x, const Tensor& weight,
                                                       double eps, const Tensor& d_y, bool needs_x,
                                                       bool needs_parameters);

Tensor poly_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  return polynomial(PolynomialKind::norm, x, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> poly_norm_backward(const Tensor& x, const Tensor& weight, double eps,
                                                      const Tensor& d_y, bool needs_x, bool needs_parameters) {
  return polynomial_backward(PolynomialKind::norm, x, weight, eps, d_y, needs_x, needs_parameters);
}

Tensor poly_relu(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return polynomial(PolynomialKind::relu, x, weight, bias, 0);
}

std::tuple<Tensor, Tensor, Tensor> poly_relu_backward(const Tensor& x, const Tensor& weight, const Tensor& d_y,
                                                      bool needs_x, bool needs_parameters) {
  return polynomial_backward(PolynomialKind::relu, x, weight, 0, d_y, needs_x, needs_parameters);
}

FASTSPARSE_POLYNOMIAL_OP(poly_norm)
FASTSPARSE_POLYNOMIAL_OP(poly_norm_backward)
FASTSPARSE_POLYNOMIAL_OP(poly_relu)
FASTSPARSE_POLYNOMIAL_OP(poly_relu_backward)
