import pytest

from qatlas.core.error import FormatError
from qatlas.export import formats, target


def test_target_is_found_by_listing():
    module, kind = target("gguf:tq2_0")
    assert kind == "tq2_0" and module.__name__ == "qatlas.export.gguf" and "checkpoint" not in formats()


def test_a_target_without_its_format_names_the_whole():
    with pytest.raises(FormatError, match=r"no export format 'q4_0'; did you mean gguf:q4_0\?$"):
        target("q4_0")
    with pytest.raises(FormatError, match="did you mean compressed-tensors:w4a16"):
        target("W4A16")


@pytest.mark.parametrize("name, near", [("gguf:q4_2", "gguf:q4_0"), ("ggml:q4_0", "gguf"), ("gguf", "gguf:f32"), ("checkpoint:x", "gguf")])
def test_unknown_target_names_the_nearest(name, near):
    with pytest.raises(FormatError, match=near):
        target(name)
