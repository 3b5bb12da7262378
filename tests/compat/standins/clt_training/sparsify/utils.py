"""The decoder."""


def decoder_impl(top_indices, top_acts, W_dec):
    return (top_acts.unsqueeze(-1) * W_dec[top_indices]).sum(dim=-2)
