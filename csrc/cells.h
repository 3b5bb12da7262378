// One step of each gated recurrence, its derivative, and the way back through it (Danieli et al. 2025, arXiv
// 2510.21450), in whatever numbers a kernel computes with: `Math` names their type, V, and has sigmoid(V) and tanh(V).
// Every kernel of every backend in C++ takes these steps, so that its solvers agree to the last bit where they should.
//
// A cell has kStates states, kWeights rows of weights and three pre-activations; all kernels follow from what is here, and
// gated_ops.h says which op it is.
#pragma once

#include "inline.h"

namespace fastsparse {

// z = sigmoid(w_z h + u_z), r = sigmoid(w_r h + u_r), n = tanh(w_n h r + u_n), and the next h = (1 - z) h + z n.
template <typename Math> struct GruCell {
  using V = typename Math::V;
  static constexpr int kStates = 1, kWeights = 3;

  V w[kWeights];  // z, r, n, as are pre-activations

  FASTSPARSE_INLINE void step(const V (&u)[3], V (&h)[1]) const {
    Gates gate = gates(u, h[0]);
    h[0] += gate.z * (gate.n - h[0]);
  }

  // Also the derivative of the next state in the one before.
  FASTSPARSE_INLINE void step(const V (&u)[3], V (&h)[1], V (&J)[1]) const {
    Gates gate = gates(u, h[0]);
    J[0] = derivative(gate, h[0]);
    h[0] += gate.z * (gate.n - h[0]);
  }

  // From the state before the step and the gradient of the one after it: that of the state before, in its place, that
  // of u, and what the step adds to that of w.
  FASTSPARSE_INLINE void back(const V (&u)[3], const V (&h)[1], V (&through)[1], V (&d_u)[3], V (&d_w)[3]) const {
    Gates gate = gates(u, h[0]);
    d_u[0] = through[0] * (gate.n - h[0]) * (gate.z * (1 - gate.z));
    d_u[2] = through[0] * gate.z * (1 - gate.n * gate.n);
    d_u[1] = d_u[2] * w[2] * h[0] * (gate.r * (1 - gate.r));
    d_w[0] += d_u[0] * h[0];
    d_w[1] += d_u[1] * h[0];
    d_w[2] += d_u[2] * (h[0] * gate.r);
    through[0] *= derivative(gate, h[0]);
  }

 private:
  struct Gates { V z, r, n; };

  FASTSPARSE_INLINE Gates gates(const V (&u)[3], V h) const {
    V z = Math::sigmoid(w[0] * h + u[0]), r = Math::sigmoid(w[1] * h + u[1]);
    return {z, r, Math::tanh(w[2] * h * r + u[2])};
  }

  FASTSPARSE_INLINE V derivative(const Gates& gate, V h) const {
    V of_n = w[2] * gate.r * (1 + h * w[1] * (1 - gate.r));
    return (1 - gate.z) + gate.z * ((1 - gate.z) * (gate.n - h) * w[0] + (1 - gate.n * gate.n) * of_n);
  }
};

// f = sigmoid(w_f h + p_f c + u_f), g = tanh(w_g h + u_g), the next c = f c + (1 - f) g, o = sigmoid(w_o h + p_o c + u_o)
// with that c, and the next h = o tanh(c). The state is (c, h).
template <typename Math> struct LstmCell {
  using V = typename Math::V;
  static constexpr int kStates = 2, kWeights = 5;

  V w[kWeights];  // of h in f, o, g, as are pre-activations; of c in f, o

  FASTSPARSE_INLINE void step(const V (&u)[3], V (&state)[2]) const {
    Gates gate = gates(u, state);
    state[0] = gate.c;
    state[1] = gate.o * gate.squashed;
  }

  // Also the derivative: J[2 i + j] is that of the next state i in the state j before.
  FASTSPARSE_INLINE void step(const V (&u)[3], V (&state)[2], V (&J)[4]) const {
    Gates gate = gates(u, state);
    V of_f = gate.f * (1 - gate.f) * (state[0] - gate.g), of_o = gate.o * (1 - gate.o) * gate.squashed;
    V of_c = of_o * w[4] + gate.o * (1 - gate.squashed * gate.squashed);  // of the next h in the next c
    J[0] = gate.f + of_f * w[3];
    J[1] = of_f * w[0] + (1 - gate.f) * (1 - gate.g * gate.g) * w[2];
    J[2] = of_c * J[0];
    J[3] = of_o * w[1] + of_c * J[1];
    state[0] = gate.c;
    state[1] = gate.o * gate.squashed;
  }

  // From the state before the step and the gradient of the one after it: that of the state before, in its place, that
  // of u, and what the step adds to that of w.
  FASTSPARSE_INLINE void back(const V (&u)[3], const V (&state)[2], V (&through)[2], V (&d_u)[3], V (&d_w)[5]) const {
    Gates gate = gates(u, state);
    d_u[1] = through[1] * gate.squashed * (gate.o * (1 - gate.o));
    V d_c = through[0] + through[1] * gate.o * (1 - gate.squashed * gate.squashed) + d_u[1] * w[4];
    d_u[0] = d_c * (state[0] - gate.g) * (gate.f * (1 - gate.f));
    d_u[2] = d_c * (1 - gate.f) * (1 - gate.g * gate.g);
    for (int gate_index = 0; gate_index < 3; ++gate_index) d_w[gate_index] += d_u[gate_index] * state[1];
    d_w[3] += d_u[0] * state[0];
    d_w[4] += d_u[1] * gate.c;
    through[0] = d_c * gate.f + d_u[0] * w[3];
    through[1] = d_u[0] * w[0] + d_u[1] * w[1] + d_u[2] * w[2];
  }

 private:
  struct Gates { V f, g, c, o, squashed; };  // c: the next

  FASTSPARSE_INLINE Gates gates(const V (&u)[3], const V (&state)[2]) const {
    V f = Math::sigmoid(w[0] * state[1] + w[3] * state[0] + u[0]), g = Math::tanh(w[2] * state[1] + u[2]);
    V c = g + f * (state[0] - g);
    V o = Math::sigmoid(w[1] * state[1] + w[4] * c + u[1]);
    return {f, g, c, o, Math::tanh(c)};
  }
};

enum class CellKind { gru, lstm };

// Calls f.operator()<Cell>() with the template of a cell.
template <typename F> auto with_cell(CellKind kind, F&& f) {
  switch (kind) {
    case CellKind::gru: return f.template operator()<GruCell>();
    default: return f.template operator()<LstmCell>();
  }
}

}  // namespace fastsparse
