# SPDX-License-Identifier: Apache-2.0
"""Full-size configs of captions and conversations as runs: shrunk, on files in the formats that they name."""

import pytest
from full_size_runs import NAMES, REGION_NAMES, assert_trained, programs_of_one_shape_are_compiled_once  # noqa: F401
from leafwise import runs_have_one_device  # noqa: F401


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*NAMES} - {*REGION_NAMES}))
def test_a_full_size_config_runs_through_all_its_stages_and_is_evaluated(name, tmp_path, monkeypatch):
    assert_trained(name, tmp_path, monkeypatch)
