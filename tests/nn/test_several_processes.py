"""Data parallelism: steps of several processes are those of one process that has all tokens."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from autoencoders import D, make, scrambled, tokens
from torch import Tensor, distributed, nn

from fastsparse.nn import Firings, JumpReLUSAE, MatchingPursuitSAE, SAELoss, SparseAutoencoder, TopKSAE

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)

SHARES = (6, 4)  # tokens of each process
BATCHES = [tokens(sum(SHARES), D, dtype=torch.float64, seed=seed).split(SHARES) for seed in range(4)]


class Score(nn.Module):
    """What DDP wraps: it acts on forward alone."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> SAELoss:
        return self.sae.loss(x)


def autoencoder(kind: type, num_latents: int = 7, **options) -> SparseAutoencoder:
    """Some latents are dead, and more of them will be in between, unless they fire."""
    if kind is JumpReLUSAE:
        options |= {"dense": "stripes", "threshold_form": "linear"}
    sae = scrambled(kind, num_latents=num_latents, k=1, aux_k=1, dead_after=15, **options)
    sae.tokens_since_fired[::3] = 15
    return sae


def train(
    sae: SparseAutoencoder, score: Callable[[Tensor], SAELoss], batches: list[list[Tensor]], group: object
) -> list[int]:
    """A step of each batch, whose parts weigh the same; returns how many latents were dead."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    dead = []
    for parts in batches:
        optimizer.zero_grad()
        outs = [score(x) for x in parts]
        (sum(out.loss for out in outs) / len(outs)).backward()
        sae.after_backward_()
        optimizer.step()
        sae.after_step_()
        kind = type(outs[0].code)
        join = sum if kind is Firings else torch.cat
        codes = zip(*(out.code for out in outs), strict=True)
        sae.count_firings_(kind(*(join(part) for part in codes)), group=group)
        dead.append(outs[0].num_dead)
    return dead


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def expect_the_steps_of_one(
    sae: SparseAutoencoder, wrap: Callable[[SparseAutoencoder], Callable[[Tensor], SAELoss]], rank: int
) -> None:
    one = copy.deepcopy(sae)
    expected = train(one, one.loss, BATCHES, "self")
    dead = train(sae, wrap(sae), [[parts[rank]] for parts in BATCHES], distributed.group.WORLD)
    assert dead == expected
    for name, buffer in sae.named_buffers():
        torch.testing.assert_close(buffer, one.get_buffer(name))
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(whole(parameter.detach()), one.get_parameter(name).detach())
    if sae.num_latents > 1:
        assert len(set(expected)) > 1


def replicate(sae: SparseAutoencoder) -> Callable[[Tensor], SAELoss]:
    return nn.parallel.DistributedDataParallel(Score(sae))


def shard(sae: SparseAutoencoder, **options) -> Callable[[Tensor], SAELoss]:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    fully_shard(sae, mesh=distributed.device_mesh.init_device_mesh("cpu", (len(SHARES),)), **options)
    register_fsdp_forward_method(sae, "loss")
    return sae.loss


def shard_leaving_the_whole(sae: SparseAutoencoder) -> Callable[[Tensor], SAELoss]:
    """Gradient accumulation's option: after backward W_dec is the gathered one, whose changes are lost."""
    score = shard(sae)
    sae.set_reshard_after_backward(False)
    return score


def work(rank: int, store: str) -> None:
    from torch.distributed.tensor import Shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(SHARES))
    for kind in (TopKSAE, MatchingPursuitSAE, JumpReLUSAE):
        expect_the_steps_of_one(autoencoder(kind), replicate, rank)
        expect_the_steps_of_one(autoencoder(kind), shard, rank)  # 4 and 3 rows
        expect_the_steps_of_one(autoencoder(kind), shard_leaving_the_whole, rank)
        expect_the_steps_of_one(autoencoder(kind, 1), shard, rank)  # 1 and 0 rows
    for wrap in (replicate, shard, shard_leaving_the_whole):
        expect_the_steps_of_one(autoencoder(TopKSAE, decoder="polynomial", ranks=(5, 3, 2)), wrap, rank)
    sae = autoencoder(TopKSAE, decoder="polynomial", ranks=(5, 3, 2))
    with torch.no_grad():
        sae.W_dec[:, 1] = sae.W_dec[:, 0]  # which Cholesky's decomposition can't mend
    one = copy.deepcopy(sae)
    shard(sae)
    sae.orthonormalize_decoder_()
    one.orthonormalize_decoder_()
    torch.testing.assert_close(whole(sae.W_dec.detach()), one.W_dec.detach())

    sae = make(TopKSAE)
    shard(sae, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    for method in (sae.remove_parallel_gradient_, sae.normalize_decoder_):
        with pytest.raises(ValueError, match=r"must be sharded by rows.*got placements \(Shard\(dim=1\)"):
            method()

    sae = make(TopKSAE)
    code = sae.encode(tokens(SHARES[rank], D))
    with pytest.raises(ValueError, match=r"group must say whose tokens are counted where 2 processes run"):
        sae.count_firings_(code)
    of_others = [distributed.new_group([0]), distributed.new_group([1])][1 - rank]
    with pytest.raises(TypeError, match=r"group must be a process group that this process is in"):
        sae.count_firings_(code, group=of_others)
    assert not sae.tokens_since_fired.any()
    sae.count_firings_(code, group="self")
    assert sae.tokens_since_fired.max() == SHARES[rank]
    distributed.destroy_process_group()


def test_steps_are_those_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=len(SHARES))
