// The tensors that each op takes, in words that a program reads; fastsparse/ops/ says the same of each op, and a test
// holds the two against one another.
//
// An entry is a tensor's name, its shape and, where it isn't that of the first tensor, its dtype; "?" marks one that may
// be absent. A letter stands for one size wherever it occurs. S, the number of sequences, is B where there are no
// cu_seqlens. Behind "|" stands what holds where the first tensor has another number of dimensions.
#pragma once

namespace fastsparse::forms {

inline constexpr char topk_encode[] =
    "x (N, D), weight (M, D), bias (M)?, latent_scale (M)?, latent_mask (M) bool?";
inline constexpr char spmm[] = "values (N, k), indices (N, k) int64, weight (M, D)";
inline constexpr char sddmm[] = "x (N, D), weight (M, D), indices (N, k) int64";
inline constexpr char spmm_t[] = "values (N, k), indices (N, k) int64, x (N, D)";
inline constexpr char matching_pursuit[] = "x (N, D), dictionary (M, D)";
inline constexpr char matching_pursuit_step[] = "residual (N, D), dictionary (M, D)";
inline constexpr char matching_pursuit_backward[] =
    "values (N, k), indices (N, k) int64, residual (N, D), dictionary (M, D), d_values (N, k), d_residual (N, D)?";
inline constexpr char linear_recurrence[] =
    "a (B, T, H), b (B, T, H), h0 (S, H)?, cu_seqlens (S + 1) int64? | "
    "a (B, T, 2, 2, H), b (B, T, 2, H), h0 (S, 2, H)?, cu_seqlens (S + 1) int64?";
inline constexpr char linear_recurrence_backward[] =
    "a (B, T, H), h0 (S, H)?, cu_seqlens (S + 1) int64?, h (B, T, H), d_h (B, T, H) | "
    "a (B, T, 2, 2, H), h0 (S, 2, H)?, cu_seqlens (S + 1) int64?, h (B, T, 2, H), d_h (B, T, 2, H)";
inline constexpr char gru_recurrence[] = "u (B, T, 3, H), weight (3, H), h0 (S, H)?, cu_seqlens (S + 1) int64?";
inline constexpr char gru_recurrence_backward[] =
    "u (B, T, 3, H), weight (3, H), h0 (S, H)?, cu_seqlens (S + 1) int64?, h (B, T, H), d_h (B, T, H)";
inline constexpr char lstm_recurrence[] =
    "u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + 1) int64?";
inline constexpr char lstm_recurrence_backward[] =
    "u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + 1) int64?, h (B, T, H), "
    "c (B, T, H), d_h (B, T, H)?, d_c (B, T, H)?";

}  // namespace fastsparse::forms
