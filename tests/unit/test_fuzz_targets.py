"""The inputs that fuzzing found, and random ones: what ./scripts/soak attacks for minutes, in a moment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_fuzzing_found(name: str) -> None:
    inputs = corpus.read(name)
    assert len(inputs) > 1, "no corpus: see tests/fuzz/corpus.py"
    for data in inputs:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=300))
def test_random_inputs(name: str, data: bytes) -> None:
    TARGETS[name](data)
