"""Cache tensors on both devices, which the same calls must leave with the same bits."""

import torch


def same_bits(a, b):
    return torch.equal(*(t.cpu().contiguous().view(torch.uint8) for t in (a, b)))


class Store:
    """A view [B, heads, slots, D] into a larger tensor of random bytes, on both devices."""

    def __init__(self, rng, generator, dtype, batch, heads, slots, dim):
        self.pad = pad = rng.choice([0, 1, 8])
        shape = (batch, heads + 1, slots + 2, (dim + 2 * pad) * dtype.itemsize)
        wide = torch.randint(256, shape, generator=generator, dtype=torch.uint8).view(dtype)
        self.wide = {"cpu": wide, "cuda": wide.cuda()}
        self.slots, self.dim = slots, dim

    def view(self, device):
        inner = self.wide[device][:, 1:, 1 : self.slots + 1]
        return inner[..., self.pad : self.pad + self.dim]

    def assert_equal(self):
        assert same_bits(self.wide["cpu"], self.wide["cuda"])
