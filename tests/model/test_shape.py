"""Sizes and names of a decoder, against torchtune's own modules at the real shapes."""

import pytest
from conftest import FORMS, MODEL
from torch import nn

from llamaq.model.build import build_model, meta_decoder
from llamaq.model.names import HUGGING_FACE, LINEARS, META, READS, SAME_INPUT, WRITES, hugging_face_name, meta_name
from llamaq.model.shape import Shape
from llamaq.quant.prepare import LLAMA_LINEARS
from llamaq.quant.scheme import Scheme

MODELS = {
    "tiny": MODEL,
    "1B": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"},
    "3B": {"_component_": "torchtune.models.llama3_2.llama3_2_3b"},
    **FORMS,
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_counts_are_those_of_the_modules(model):
    decoder = meta_decoder(model)
    shape = Shape.of(decoder)
    linears = [m for n, m in decoder.named_modules() if n.startswith("layers.") and isinstance(m, nn.Linear)]
    assert shape.weights == sum(p.numel() for p in decoder.parameters())
    assert shape.linears == sum(m.weight.numel() for m in linears)
    assert shape.embedding == decoder.tok_embeddings.weight.numel()
    assert shape.ends == shape.embedding + (
        decoder.output.weight.numel() if isinstance(decoder.output, nn.Linear) else 0
    )
    assert shape.adapters_per_rank == sum(m.in_features + m.out_features for m in linears)


def test_the_shape_of_1b_by_hand():
    shape = Shape.of(meta_decoder(MODELS["1B"]))
    assert (shape.layers, shape.dim, shape.heads, shape.kv_heads, shape.head_dim) == (16, 2048, 32, 8, 64)
    assert (shape.hidden, shape.kv_dim, shape.vocab, shape.weights) == (8192, 512, 128256, 1_235_814_400)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_prepared_model_has_the_same_shape(frozen):
    for model in (MODEL, *FORMS.values()):
        assert Shape.of(build_model(model, None, Scheme(), frozen=frozen).decoder) == Shape.of(meta_decoder(model))


def test_every_table_of_linears_has_the_seven():
    assert sorted(LINEARS) == sorted([*READS, *WRITES]) == sorted(name for group in SAME_INPUT for name in group)
    assert all(LLAMA_LINEARS.fullmatch(f"layers.11.{name}") for name in LINEARS)
    assert set(META) == set(HUGGING_FACE) == set(LINEARS) and len(LINEARS) == 7


def test_names_in_other_layouts():
    assert meta_name("layers.3.mlp.w3") == "layers.3.feed_forward.w3"
    assert hugging_face_name("layers.10.mlp.w3") == "layers.10.mlp.up_proj"
    assert hugging_face_name("layers.0.attn.output_proj") == "layers.0.self_attn.o_proj"
