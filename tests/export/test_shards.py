"""What a directory says of its quantization, and what stands in the way of asking."""

import json
import os

import pytest

from qatlas.core.error import FormatError
from qatlas.export import awq, gptq
from qatlas.export.shards import quantization


def test_the_old_file_counts_where_config_says_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "old.json").write_text(json.dumps({"bits": 4}))
    assert quantization(tmp_path, "gptq", "old.json") == {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(FormatError, match="describes no gptq model, its quantization is by 'awq'"):
        quantization(tmp_path, "gptq", "old.json")
    with pytest.raises(FormatError, match="no gptq directory"):
        quantization(tmp_path / "none", "gptq", "old.json")


@pytest.mark.parametrize("form, old", [(awq, "quant_config.json"), (gptq, "quantize_config.json")])
def test_a_pipe_is_not_passed_over_for_the_old_file(form, old, tmp_path):
    (tmp_path / old).write_text(json.dumps({"bits": 4, "w_bit": 4, "q_group_size": 32, "group_size": 32}))
    assert form.holds(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    assert not form.holds(tmp_path)
    with pytest.raises(FormatError, match="no file config.json"):
        form.qtensors(tmp_path)
