"""What a model's step computes and keeps: operations and bytes, counted without running it.

Models are run on PyTorch's meta device, where tensors have shapes and no values, so that nothing is
allocated. What is counted is the model's maths: it does not depend on which kernels compute it.
Chapter 16 uses both this file and `estimate`.

Shapes: B batch · nh heads · N queries · M keys · d dv head dims.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinyvgpt.attention import StridedLayout
from tinyvgpt.codebook import Codebook, Quantized
from tinyvgpt.gpt import GPT, Block, GPTConfig
from tinyvgpt.vqvae import VQVAE, ResidualBlock, VQVAEConfig

Config = VQVAEConfig | GPTConfig


def forward_flops(config: Config) -> float:
    """FLOPs of one clip's forward pass; a multiply-add is two.

    Counted are matrix products, convolutions and attention, conditioning and the codebook's search
    included: N(N + 1)/2 scores a head for causal attention over N tokens, what its layout sees for
    strided attention. A convolution counts kernel · channels in · channels out at every point of
    its output (a transposed one of its input), zeros around the clip included. Norms, activations,
    softmax and losses are not counted.
    """
    return _count(config)[0]


def step_flops(config: Config, clips: int) -> float:
    """FLOPs of a training step's forward and backward pass over so many clips.

    The backward pass takes twice the forward one's, but for what has no gradient: the codebook's
    search, and the inputs of what reads clips, codes or actions. What is computed again because
    memory is short (activation checkpointing, attention's scores) is not counted: it is not
    needed (PaLM, Chowdhery et al. 2022, appendix B). Nor are the optimizer (elementwise) and the
    tokenizer that makes a GPT's tokens, as tokens can be made beforehand.
    """
    return clips * sum(_count(config))


def clip_work(config: GPTConfig, openings: float) -> tuple[float, float]:
    """Tokens and step FLOPs of a GPT's clip, means where a share of clips are openings.

    Those end after their first latent frame.
    """
    whole = config.tokens, step_flops(config, 1)
    if not openings:
        return whole
    first = clip_work(replace(config, latent_shape=(1, *config.latent_shape[1:])), 0.0)
    tokens, flops = (
        (1 - openings) * of_whole + openings * of_first
        for of_whole, of_first in zip(whole, first, strict=True)
    )
    return tokens, flops


@lru_cache(maxsize=32)
def _count(config: Config) -> tuple[float, float]:
    """FLOPs of the forward and of the backward pass over one clip."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    config = replace(config, checkpointing=False)
    model = on_meta(config).eval()  # all is counted, nothing dropped or updated
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with FusedAttention(seen_pairs(config)) as attention:
        with forward:
            # Not the GPT's loss, which is free to recompute logits.
            inputs = meta_batch(config, 1)
            output = model(**inputs) if isinstance(model, GPT) else model(**inputs).loss
        with backward:
            output.float().sum().backward()
    return (
        forward.get_total_flops() + attention.flops,
        backward.get_total_flops() + 2 * attention.flops,
    )


def on_meta(config: Config) -> VQVAE | GPT:
    """A model without values."""
    with torch.device("meta"):
        if isinstance(config, GPTConfig):
            return GPT(config)
        vqvae = VQVAE(config)
    # What switches off autocast, which the meta device doesn't know, is done without.
    vqvae.codebook = Search(vqvae.codebook)  # type: ignore[assignment]
    vqvae.features = lambda x: vqvae.to_code(vqvae.encoder(x))  # type: ignore[method-assign]
    return vqvae


class Search(nn.Module):
    """The codebook's search and loss."""

    def __init__(self, codebook: Codebook):
        super().__init__()
        self.codebook = codebook

    def forward(self, z: Tensor) -> Quantized:
        """Quantises z (B, D, t, h, w)."""
        z = z.float()
        flat = z.detach().movedim(1, -1)  # (B, t, h, w, D)
        tokens = (flat @ self.codebook.codes.T).argmin(-1)
        vectors = self.codebook.lookup(tokens).movedim(-1, 1)
        loss, scalar = F.mse_loss(z, vectors), z.new_empty(())
        return Quantized(z + (vectors - z).detach(), tokens, loss, scalar, scalar)


def meta_batch(config: Config, clips: int) -> dict[str, Tensor]:
    """What the model's forward pass takes, without values."""
    size = (config.resolution, config.resolution)
    with torch.device("meta"):
        if isinstance(config, VQVAEConfig):
            return {"x": torch.empty(clips, config.channels, config.frames, *size)}
        batch = {"tokens": torch.empty(clips, *config.latent_shape, dtype=torch.int64)}
        if config.classes:
            batch["labels"] = torch.empty(clips, dtype=torch.int64)
        if config.cond_frames:
            batch["frames"] = torch.empty(clips, config.channels, config.cond_frames, *size)
        if config.action_dim:
            batch["actions"] = torch.empty(clips, config.frames, config.action_dim)
        return batch


def seen_pairs(config: Config) -> int:
    """Pairs of query and key that a mask leaves; 0 for models that use none."""
    if isinstance(config, GPTConfig) and config.attention == "strided":
        return int(StridedLayout(config.latent_shape).mask.sum())
    return 0


class FusedAttention(TorchFunctionMode):
    """Within it attention keeps what fused kernels keep, and its FLOPs are added up in `flops`.

    On the meta device PyTorch would take the plain formula, with all scores.
    """

    def __init__(self, masked_pairs: int = 0):
        """`masked_pairs`: those that a mask leaves, as a mask on the meta device has no values."""
        super().__init__()
        self.masked_pairs, self.flops = masked_pairs, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or what stands for it."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        """Stands for scaled dot-product attention."""
        b, nh, n, d = q.shape
        m = k.shape[2]
        pairs = n * (n + 1) // 2 if is_causal else n * m
        if attn_mask is not None:
            pairs = self.masked_pairs
        self.flops += 2.0 * b * nh * pairs * (d + v.shape[3])
        return Attended.apply(q, k, v)


class Attended(torch.autograd.Function):
    """Attention's shapes, and what fused kernels keep: q, k, v, output, a logarithm a query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, nh, N, dv), laid out (B, N, nh, dv) as by the kernels."""
        b, nh, n, _ = q.shape
        out = v.new_empty(b, n, nh, v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(b, nh, n, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k and v."""
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def kept_bytes(config: Config, clips: int, dtype: torch.dtype, *, compiled: bool) -> int:
    """Bytes of what the loss's forward pass keeps for its backward pass.

    Not compiled: every tensor that autograd saves, each storage once. Compiled: inputs and outputs
    of products and attention, as the steps between are computed again from them. With activation
    checkpointing: what is kept outside the blocks, each block's input, and one whole block,
    recomputed. To it comes the gradient of the largest tensor, which stands beside it when the
    backward pass starts.

    Attention is taken to be fused and to keep no scores, but with dropout where not compiled: there
    CPUs keep all of them.
    """
    checkpointing, config = config.checkpointing, replace(config, checkpointing=False)
    model, inputs = on_meta(config).train(), meta_batch(config, clips)
    of_model = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    recorder = Recorder(of_model, dtype, compiled=compiled)
    for module in model.modules():
        if isinstance(module, Block | ResidualBlock):
            module.register_forward_pre_hook(recorder.enter)
            module.register_forward_hook(recorder.leave)
    with recorder.saving(), recorder:
        model.loss(**inputs) if isinstance(model, GPT) else model(**inputs).loss
    return recorder.total(checkpointing=checkpointing)


class Recorder(FusedAttention):
    """Within it products are computed as under autocast, and what is kept is recorded.

    Autocast itself knows no meta device.
    """

    PRODUCTS = (F.linear, F.conv3d, F.conv_transpose3d)

    def __init__(self, of_model: set[int], dtype: torch.dtype, *, compiled: bool):
        """`of_model` are the storages that are there anyway."""
        super().__init__()
        self.of_model, self.dtype, self.compiled = of_model, dtype, compiled
        self.block = 0  # number of the block being run; 0 outside of blocks
        self.blocks = 0
        self.kept: dict[int, tuple[Tensor, int]] = {}  # storage: a tensor in it, its block
        self.inputs: list[Tensor] = []  # of the blocks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or what stands for it."""
        kwargs = kwargs or {}
        if func in self.PRODUCTS:
            args = [self.cast(a) for a in args]
            out = func(*args, **{name: self.cast(a) for name, a in kwargs.items()})
            self.product(*args, out)
            return out
        if func is F.scaled_dot_product_attention and not self.plain(*args, **kwargs):
            out = self.attend(*args, **kwargs)
            self.product(*args[:3], out)
            return out
        return func(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> bool:
        """Whether attention keeps all scores."""
        dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
        return dropout > 0 and not self.compiled

    def cast(self, argument: Any) -> Any:
        """As autocast does with the arguments of products."""
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument.to(self.dtype)
        return argument

    def product(self, *tensors: Any) -> None:
        """Records a product's inputs and output, if it has a backward pass."""
        if self.compiled and tensors[-1].requires_grad:
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    self.keep(tensor)

    def saving(self) -> Any:
        """Context in which what autograd saves is recorded, unless compiled."""

        def pack(tensor: Tensor) -> Tensor:
            if not self.compiled:
                self.keep(tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> None:
        """Records a tensor's storage."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self.of_model:
            self.kept.setdefault(storage, (tensor, self.block))

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A block begins."""
        self.blocks += 1
        self.block = self.blocks
        self.inputs.append(args[0])

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A block ends."""
        self.block = 0

    def total(self, *, checkpointing: bool) -> int:
        """Bytes kept, and the largest tensor's once more."""
        sizes = [0] * (self.blocks + 1)
        for tensor, block in self.kept.values():
            sizes[block] += tensor.untyped_storage().nbytes()
        largest = max(tensor.untyped_storage().nbytes() for tensor, _ in self.kept.values())
        if checkpointing:
            inputs = sum(tensor.nbytes for tensor in self.inputs)
            return sizes[0] + inputs + max(sizes[1:], default=0) + largest
        return sum(sizes) + largest
