"""One step of each gated recurrence, its derivative, and the way back through it, on blocks in fp32.

What csrc/cells.h is to C++. CELL names one. A state is a tuple, (h,) of a GRU and (c, h) of an LSTM. So is u,
(z, r, n) or (f, o, g), and so are weights, (z, r, n), or those of h in f, o, g and of c in f, o. A sum of
products that could be contracted in two ways says in which one: every kernel takes bitwise the same steps.
"""

import triton
import triton.language as tl

STATES = {"gru": 1, "lstm": 2}  # of a channel


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), to a few units in the last place, and |x| more where x < 0; NaN stays NaN.

    Triton's exp is 2^(x log2(e)) on a GPU in fp32: that product is rounded.
    """
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """To a few units in the last place, also near 0, where 1 - 2 / (exp(2x) + 1) cancels; NaN stays NaN."""
    square = x * x
    # (tanh(x) - x) / x^3 for |x| < 1/2, by which tanh is off by 2^-26 of itself at most.
    series = tl.fma(square, 0.017256990, -0.053052952)
    series = tl.fma(square, series, 0.13325987)
    series = tl.fma(square, series, -0.33333148)
    size = tl.abs(x)
    far = 1 - 2 / (1 + tl.exp(2 * size))
    return tl.where(size < 0.5, tl.fma(x * square, series, x), tl.where(x < 0, -far, far))


@triton.jit
def load_weights(weight, peephole, channel, inside, H):
    """The weights of channels, from weight (3, H) and, of an LSTM, peephole (2, H), both contiguous."""
    w = _load_row(weight, channel, inside), _load_row(weight + H, channel, inside)
    w = w[0], w[1], _load_row(weight + 2 * H, channel, inside)
    if peephole is not None:
        w += (_load_row(peephole, channel, inside), _load_row(peephole + H, channel, inside))
    return w


@triton.jit
def _load_row(row, channel, inside):
    return tl.load(row + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def step(CELL: tl.constexpr, w, u, state):
    """The next state."""
    return _gru_step(w, u, state) if CELL == "gru" else _lstm_step(w, u, state)


@triton.jit
def step_with_derivative(CELL: tl.constexpr, w, u, state):
    """The next state, and its derivative: (J,), or J[2 i + j], which is that of state i in state j."""
    return _gru_tangent(w, u, state) if CELL == "gru" else _lstm_tangent(w, u, state)


@triton.jit
def back(CELL: tl.constexpr, w, u, state, through):
    """From the state before a step, and ``through``, the gradient of the one after it.

    Returns the gradient of the state before, that of u, and what the step adds to that of the weights.
    """
    return _gru_back(w, u, state, through) if CELL == "gru" else _lstm_back(w, u, state, through)


@triton.jit
def _gru_gates(w, u, h):
    z = sigmoid(tl.fma(w[0], h, u[0]))
    r = sigmoid(tl.fma(w[1], h, u[1]))
    return z, r, tanh(tl.fma(w[2] * h, r, u[2]))


@triton.jit
def _gru_derivative(w, z, r, n, h):
    of_n = w[2] * r * tl.fma(h * w[1], 1 - r, 1.0)
    return tl.fma(z, tl.fma((1 - z) * (n - h), w[0], (1 - n * n) * of_n), 1 - z)


@triton.jit
def _gru_step(w, u, state):
    h = state[0]
    z, _, n = _gru_gates(w, u, h)
    return (tl.fma(z, n - h, h),)


@triton.jit
def _gru_tangent(w, u, state):
    h = state[0]
    z, r, n = _gru_gates(w, u, h)
    return (tl.fma(z, n - h, h),), (_gru_derivative(w, z, r, n, h),)


@triton.jit
def _gru_back(w, u, state, through):
    h, d_h = state[0], through[0]
    z, r, n = _gru_gates(w, u, h)
    d_z = d_h * (n - h) * (z * (1 - z))
    d_n = d_h * z * (1 - n * n)
    d_r = d_n * w[2] * h * (r * (1 - r))
    before = d_h * _gru_derivative(w, z, r, n, h)
    return (before,), (d_z, d_r, d_n), (d_z * h, d_r * h, d_n * (h * r))


@triton.jit
def _lstm_gates(w, u, c, h):
    """f, g, the next c, o, and tanh of the next c."""
    f = sigmoid(tl.fma(w[0], h, tl.fma(w[3], c, u[0])))
    g = tanh(tl.fma(w[2], h, u[2]))
    after = tl.fma(f, c - g, g)
    o = sigmoid(tl.fma(w[1], h, tl.fma(w[4], after, u[1])))
    return f, g, after, o, tanh(after)


@triton.jit
def _lstm_step(w, u, state):
    c, h = state
    _, _, after, o, squashed = _lstm_gates(w, u, c, h)
    return after, o * squashed


@triton.jit
def _lstm_tangent(w, u, state):
    c, h = state
    f, g, after, o, squashed = _lstm_gates(w, u, c, h)
    of_f = f * (1 - f) * (c - g)
    of_o = o * (1 - o) * squashed
    of_c = tl.fma(of_o, w[4], o * (1 - squashed * squashed))  # of the next h in the next c
    c_c = tl.fma(of_f, w[3], f)
    c_h = tl.fma(of_f, w[0], (1 - f) * (1 - g * g) * w[2])
    return (after, o * squashed), (c_c, c_h, of_c * c_c, tl.fma(of_o, w[1], of_c * c_h))


@triton.jit
def _lstm_back(w, u, state, through):
    c, h = state
    f, g, after, o, squashed = _lstm_gates(w, u, c, h)
    d_o = through[1] * squashed * (o * (1 - o))
    d_c = tl.fma(through[1] * o, 1 - squashed * squashed, tl.fma(d_o, w[4], through[0]))
    d_f = d_c * (c - g) * (f * (1 - f))
    d_g = d_c * (1 - f) * (1 - g * g)
    before = tl.fma(d_f, w[3], d_c * f), tl.fma(d_f, w[0], tl.fma(d_o, w[1], d_g * w[2]))
    return before, (d_f, d_o, d_g), (d_f * h, d_o * h, d_g * h, d_f * c, d_o * after)
