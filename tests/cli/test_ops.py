"""`edgeattn ops`: the dossiers as a table, as text and as JSON."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgeattn.cli import main
from edgeattn.cli.ops import command
from edgeattn.ops import ALL_OPS


def test_the_table_has_every_operator() -> None:
    found = CliRunner().invoke(command)
    assert found.exit_code == 0
    for spec in ALL_OPS:
        assert spec.name in found.output


@pytest.mark.parametrize("spec", ALL_OPS, ids=lambda spec: spec.name)
def test_a_dossier_names_everything_a_caller_needs(spec) -> None:
    found = CliRunner().invoke(command, [spec.name])
    assert found.exit_code == 0
    names = [*(t.name for t in (*spec.inputs, *spec.outputs)), *(a.name for a in spec.attributes)]
    for name in (*names, *spec.tolerance):
        assert f"  {name}" in found.output
    assert spec.meaning.splitlines()[0] in found.output


def test_json_holds_the_facts() -> None:
    found = json.loads(CliRunner().invoke(command, ["--json"]).output)
    assert [op["name"] for op in found["ops"]] == [spec.name for spec in ALL_OPS]
    recurrent = next(op for op in found["ops"] if op["name"] == "RecurrentLinearAttention")
    assert recurrent["outputs"][1]["updates"] == "past_state"
    assert {a["name"] for a in recurrent["attributes"]} >= {"delta", "normalise"}
    assert {"reference", "function body"} <= set(recurrent["implementations"])


def test_an_unknown_name_lists_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["ops", "HadamardTransfrom"])
    assert exit.value.code == 2
    assert "HadamardTransform" in capsys.readouterr().err
