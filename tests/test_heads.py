"""The head that the engine is told is the model's own, for every causal LM type of transformers."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_models import LARGE, LIMIT, UNBUILT, tiny_of
from opsd_kernels.integrations.hf import check_head, head_of

IDS = torch.arange(3, 9)[None]
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# What stands before their last layer is more than a backbone.
TRANSFORMED = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "modernbert-decoder", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind: str) -> None:
    """Equal to the model's own logits, entry by entry, with scales and caps that matter; or refused."""
    if kind in LARGE:
        with torch.device("meta"):
            assert sum(one.numel() for one in tiny_of(kind).parameters()) > LIMIT
    elif kind in UNBUILT:
        with pytest.raises(Exception, match=UNBUILT[kind]):
            tiny_of(kind)(input_ids=IDS)
    elif kind in TRANSFORMED:
        with pytest.raises(ValueError, match=f"a model of type {kind}, with a"):
            head_of(tiny_of(kind))
    else:
        check_head(tiny_of(kind), IDS)


def test_the_lists_have_no_other_types() -> None:
    assert set(KINDS) >= LARGE | set(UNBUILT) | TRANSFORMED
    assert len(KINDS) - len(LARGE) - len(UNBUILT) - len(TRANSFORMED) >= 132
