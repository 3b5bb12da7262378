"""A language model of characters from two ParaGRU layers, trained on Python's own manual.

All time steps of a sequence are one call; generating takes them one by one, from the state of the last.
"""

import sys
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsparse.nn import ParaGRU

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 250
WIDTH, LENGTH, BATCH, RATE = 128, 128, 16, 5e-3

text = " ".join(" ".join(topics.values()).split())
symbols = sorted(set(text))
coded = torch.tensor([symbols.index(character) for character in text[:300_000]])
torch.manual_seed(0)


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(symbols), WIDTH)
        self.gru = ParaGRU(WIDTH, WIDTH, num_layers=2)
        self.read_out = nn.Linear(WIDTH, len(symbols))

    def loss(self, window: Tensor) -> Tensor:
        """Mean nats a character of (B, T + 1) symbols."""
        states, _ = self.gru(self.embedding(window[:, :-1]))
        return F.cross_entropy(self.read_out(states).flatten(0, 1), window[:, 1:].flatten())

    @torch.no_grad()
    def write(self, start: str, count: int) -> str:
        """Go on from some characters, one at a time."""
        ids, state = [symbols.index(character) for character in start], None
        for place in range(len(start) + count - 1):
            output, state = self.gru.step(self.embedding(torch.tensor(ids[place : place + 1])), state)
            if place == len(ids) - 1:
                ids.append(int(torch.multinomial((2 * self.read_out(output[0])).softmax(-1), 1)))
        return "".join(symbols[i] for i in ids)


model = LanguageModel()
optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
for step in range(1, STEPS + 1):
    optimizer.param_groups[0]["lr"] = RATE * min(1, 3 * (1 - step / STEPS) + 1e-3)
    starts = torch.randint(len(coded) - LENGTH, (BATCH, 1))
    optimizer.zero_grad()
    loss = model.loss(coded[starts + torch.arange(LENGTH + 1)])
    loss.backward()
    optimizer.step()
    if step % max(1, STEPS // 5) == 0:
        print(f"step {step}: {loss / torch.log(torch.tensor(2.0)):.2f} bits a character")
print(model.write("The statement ", 120))
