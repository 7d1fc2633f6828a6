"""Any nested state splits into tensors and JSON, and comes back exactly."""

from __future__ import annotations

import json
import math
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.training.checkpoint import CheckpointStore
from graft.training.state import STORABLE_DTYPES, flatten_state, unflatten_state


def same(a, b):
    """Equality that tells apart 1, 1.0 and True, tuples and lists, -0.0 and 0.0, and NaN payloads."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    return a == b


def same_bits(a, b):
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*as_bytes)


DTYPES = sorted(STORABLE_DTYPES, key=str)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = math.prod(shape) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytes(byte & 1 for byte in content)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([torch.float32, torch.bool])
)
KEYS = st.one_of(st.text(), st.integers(), st.sampled_from(["$", "__metadata__", "a.b", "a"]))
STATES = st.recursive(
    st.one_of(SCALARS, tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)


QUIET_NAN, SIGNALLING_NAN = (struct.unpack(">d", bytes.fromhex(h))[0] for h in ("fff8000000000abc", "7ff0000000000001"))
CORNERS = [  # what drawing at random may miss
    [QUIET_NAN, SIGNALLING_NAN, math.inf, -math.inf, -0.0, 5e-324],
    [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**5000],
    {"__metadata__": torch.zeros(1)},
    {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "a.b~2": torch.full((1,), 2.0)},
    {"0": torch.zeros(1), 0: torch.ones(1)},
    {"$": "tuple", "items": []},
    {True: 1, 2: (), None: []},
]


@pytest.mark.parametrize("state", CORNERS)
def test_corner_cases_come_back_exactly(tmp_path, state):
    named, document = flatten_state(state)
    store = CheckpointStore(tmp_path)
    store.save(1, {"state": named}, {"state": document}, {})
    loaded = store.load()
    assert same(unflatten_state(loaded.tensors["state"], loaded.documents["state"]), state)


@settings(max_examples=200, deadline=None)
@given(STATES)
def test_every_state_comes_back_exactly(state):
    named, document = flatten_state(state)
    text = json.dumps(document, allow_nan=False)
    assert same(unflatten_state(named, json.loads(text)), state)


@settings(max_examples=15, deadline=None)
@given(STATES)
def test_every_state_comes_back_exactly_through_the_disk(tmp_path_factory, state):
    named, document = flatten_state(state)
    store = CheckpointStore(tmp_path_factory.mktemp("state"))
    store.save(1, {"state": named}, {"state": document}, {})
    loaded = store.load()
    assert same(unflatten_state(loaded.tensors["state"], loaded.documents["state"]), state)


def test_python_random_state_continues_where_it_was():
    generator = random.Random(5)
    generator.gauss(0, 1)
    _, document = flatten_state(generator.getstate())
    expected = [generator.gauss(0, 1) for _ in range(3)]
    restored = random.Random()
    restored.setstate(unflatten_state({}, json.loads(json.dumps(document))))
    assert [restored.gauss(0, 1) for _ in range(3)] == expected


def test_optimizer_state_continues_where_it_was():
    def make():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3))
        return weight, torch.optim.AdamW([weight], lr=0.1)

    def update(weight, optimizer):
        weight.grad = weight.detach().sin()
        optimizer.step()

    weight, optimizer = make()
    update(weight, optimizer)
    named, document = flatten_state({"weight": weight, "optimizer": optimizer.state_dict()})
    stored = {name: tensor.detach().clone() for name, tensor in named.items()}
    update(weight, optimizer)
    other, resumed = make()
    state = unflatten_state(stored, json.loads(json.dumps(document)))
    other.data.copy_(state["weight"])
    resumed.load_state_dict(state["optimizer"])
    update(other, resumed)
    assert torch.equal(other, weight)


def test_one_tensor_in_two_places_is_stored_once_and_comes_back_as_one():
    shared = torch.ones(3)
    named, document = flatten_state({"a": shared, "b": [shared]})
    back = unflatten_state(named, document)
    assert len(named) == 1
    assert back["a"] is back["b"][0]


def test_restored_tensors_do_not_alias_the_stored_ones():
    named, document = flatten_state([torch.zeros(2)])
    unflatten_state(named, document)[0].add_(1)
    assert torch.equal(next(iter(named.values())), torch.zeros(2))


@pytest.mark.parametrize(
    "value",
    [object(), {"f": print}, b"bytes", {1, 2}, {(1, 2): 0}, torch.zeros(2).to_sparse(), torch.zeros(2).cdouble()],
)
def test_what_cannot_be_stored_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"state at optimizer\.1.*cannot be stored"):
        flatten_state({"optimizer": [0, value]})


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"state": {"$": "tensor", "name": "gone"}},
        {"state": {"$": "pickle"}},
        {"state": {"$": "float", "bits": "00"}},
    ],
)
def test_a_document_of_another_kind_is_a_value_error(document):
    with pytest.raises(ValueError, match="stored state"):
        unflatten_state({}, document)
