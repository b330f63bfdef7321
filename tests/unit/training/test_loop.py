# SPDX-License-Identifier: Apache-2.0
"""What the loop does before its first update."""

import pytest
import toy

from lionjax.core.types import UserError
from lionjax.training import loop


def test_a_later_stage_without_data_is_refused_before_the_first_update(tmp_path):
    def make_batches(data, stage, *arguments):
        if stage.name == "two":
            raise UserError("no data source has the task of stage two")
        return toy.Batches(data, stage, *arguments)

    with pytest.raises(UserError, match="stage two"):
        loop.train(toy.experiment(), tmp_path, make_batches)
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "base").exists()
