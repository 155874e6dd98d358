"""Backbone and head of a causal language model of transformers, with PEFT's adapters if it has some.

The engine projects hidden states itself, so it has to know all that stands between a backbone's last hidden
states and the model's logits. `head_of` reads that off the model, `check_head` compares it with the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_kernels.backends.reference import logits
from opsd_kernels.sources import Hidden

TOLERANCE = 1e-4  # of the largest logit: fp32 leaves parts in 10^6, a forgotten scale or soft-cap far more
# Fields of configurations. What multiplies logits, or the states before the head, and what divides them.
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# By model_type, where transformers' model does something else with a field of that name, or nothing.
_MULTIPLIES = {"hyperclovax": "logits_scaling"}
_UNUSED = {"mpt": "logit_scale", "gemma3": "final_logit_softcapping"}
# Types whose last layer is no child of the model itself, and which yet do nothing before it.
_NESTED = ("bert-generation", "reformer", "xlm")
# Types of which it is one, and which do more; all others with a nested last layer are refused too.
_TRANSFORMS = {
    "electra": "a dense layer",
    "modernbert-decoder": "a dense layer and a norm",
    "prophetnet": "a stream of its own",
}


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: `z = cap(logit_scale * (h @ weight.T + bias))`, as `Hidden` has it.

    Args:
        weight: `[V, H]`, the model's own parameter, or W + sBA where the head has a LoRA adapter: a
            tensor with a graph, whose gradient reaches A and B.
        bias: `[V]` or None.
        logit_scale: multiplies the logits.
        softcap: None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Hidden:
        """The source of `opsd_kernels.loss` over hidden states `[..., H]`."""
        return Hidden(hidden, self.weight, self.bias, self.logit_scale, self.softcap)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model itself: a PEFT model's adapters live inside it and stay active.

    Raises ValueError for anything else, and for PEFT's prompt learning, whose virtual tokens live outside it.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        config = inner.active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"model: expected adapters inside the model's layers, got {config.peft_type.value}, "
                "whose virtual tokens stand before its input"
            )
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ValueError(
            f"model: expected a causal language model of transformers, got {type(inner).__name__}"
        )
    return inner


def backbone_of(model: nn.Module) -> nn.Module:
    """The module whose `last_hidden_state` `[B, L, H]` the head projects; adapters inside it stay active.

    Not `get_decoder()`, which of some models is a part of it, and of others the head.
    """
    inner = causal_lm(model)
    base = inner.base_model
    # Llama4ForCausalLM has the name of a module of another model as its prefix.
    return getattr(inner, "model", base) if base is inner else base


def head_of(model: nn.Module) -> Head:
    """The head of a model: weight, bias, scale and soft-cap, adapters on it included.

    Raises ValueError naming the model's type if there is more between the backbone's states and the logits
    than a linear layer with these, or naming the adapter if it is more than a plain LoRA.
    """
    inner = causal_lm(model)
    out = inner.get_output_embeddings()
    kind = inner.config.model_type
    nested = kind not in _NESTED and not any(child is out for child in inner.children())
    if kind in _TRANSFORMS or nested:
        what = _TRANSFORMS.get(kind, "a transform")
        raise ValueError(
            f"model: expected a linear head over the last hidden states, got a model of type {kind}, "
            f"with {what} before its last layer"
        )
    weight, bias = _matrix(out)
    text = inner.config.get_text_config()
    scale, softcap = _scale_and_softcap(kind, text)
    real = getattr(text, "unpadded_vocab_size", None) or len(weight)
    if real < len(weight):
        weight, bias = weight[:real], None if bias is None else bias[:real]
    return Head(weight, bias, scale, softcap)


def _scale_and_softcap(kind: str, config: Any) -> tuple[float, float | None]:
    def field(name: str) -> float | None:
        return None if _UNUSED.get(kind) == name else getattr(config, name, None)

    scale = 1.0
    for name in _FACTORS + _DIVISORS:
        value = field(name)
        if value is not None:
            scale *= value if name in _FACTORS or _MULTIPLIES.get(kind) == name else 1 / value
    return scale, next((cap for name in _SOFTCAPS if (cap := field(name)) is not None), None)


def _matrix(out: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the output layer; of PEFT's wrappers what is active in them."""
    if hasattr(out, "modules_to_save"):
        active = out.active_adapters
        saved = not out.disable_adapters and active and active[0] in out.modules_to_save
        return _matrix(out.modules_to_save[active[0]] if saved else out.original_module)
    if hasattr(out, "lora_A"):
        return _with_lora(out)
    if type(out).forward is not nn.Linear.forward:
        raise ValueError(f"model: expected a linear layer as its head, got {type(out).__name__}")
    return out.weight, out.bias


def _with_lora(out: Any) -> tuple[Tensor, Tensor | None]:
    """W + sum of s B A over the active adapters, `[V, H]`, formed once a call."""
    weight, bias = _matrix(out.get_base_layer())
    if out.merged and out.disable_adapters:
        raise ValueError("model: expected adapters on the head to be unmerged before they are disabled")
    active = [] if out.merged or out.disable_adapters else [a for a in out.active_adapters if a in out.lora_A]
    for name in active:
        dropout = out.lora_dropout[name]
        more = {
            "a variant of LoRA": name in out.lora_variant,
            "a bias": out.lora_B[name].bias is not None,
            "dropout": out.training and not isinstance(dropout, nn.Identity) and dropout.p > 0,
        }
        if any(more.values()):
            what = " and ".join(word for word, there in more.items() if there)
            raise ValueError(f"model: expected plain LoRA on its head, got adapter {name!r} with {what}")
        weight = weight + out.get_delta_weight(name).to(weight.dtype)
    return weight, bias


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode it was in, whatever its parent's."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_head(model: nn.Module, input_ids: Tensor, states: Callable[[Tensor], Tensor] | None = None) -> None:
    """Raise ValueError unless `head_of` over `backbone_of` gives the model's own logits, entry by entry.

    Some architectures transform hidden states or logits in ways of their own; training them on logits that
    are not theirs would look right and be wrong. A model in a 2-byte dtype multiplies with its head in fp32
    meanwhile, so that rounding does not hide a soft-cap.

    Args:
        model: as `head_of` takes it.
        input_ids: int `[B, L]`, a few tokens of a prompt.
        states: a function of `input_ids` that returns the states to project, `[B, L, H]`, where they are
            computed in another way than by a call of the backbone.
    """
    states = states or (lambda ids: backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    with evaluating(model):
        head = head_of(model)
        with _exact_product(model, head):
            own = model(input_ids=input_ids, use_cache=False).logits.float()
        z = logits(head(states(input_ids)))
    difference = torch.inf
    if z.shape == own.shape:
        difference = ((z - own).abs().amax() / own.abs().amax().clamp(min=1e-30)).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            "model: expected a head that is a linear layer with bias, logit scale and soft-cap; the logits "
            f"of {type(causal_lm(model)).__name__} differ from that by {difference:.2%} of the largest"
        )


def _exact_product(model: nn.Module, head: Head) -> Any:
    """Inside, the output layer of a model in a 2-byte dtype returns its product in fp32."""
    if head.weight.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()

    def product(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight, bias = _matrix(module)
        return F.linear(inputs[0].float(), weight.float(), None if bias is None else bias.float())

    return causal_lm(model).get_output_embeddings().register_forward_hook(product)
