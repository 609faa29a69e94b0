"""`doctor`: will it work there, and if not, what would. Nothing is loaded, built or written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeattn.bundle.bundle import MANIFEST, MODEL
from edgeattn.devices.probe import Probe, matching_target, probe
from edgeattn.devices.registry import Target, parse_target
from edgeattn.errors import EdgeattnError, UsageError
from edgeattn.pipeline import doctor_bundle, doctor_model
from edgeattn.pipeline.doctor_machine import machine_findings, tool_findings
from edgeattn.pipeline.findings import Diagnosis, Finding, refused
from edgeattn.recipe import Recipe

_LIMITS = ("context", "batch")


def diagnose(
    subject: str | Path | None = None,
    *,
    target: str | None = None,
    asked: Mapping[str, Any] | None = None,
    offline: bool = False,
    found: Probe | None = None,
) -> Diagnosis:
    """Looks at a model, a bundle, or this machine alone.

    Args:
        subject: MODEL as `export` takes it, without its weights where only config.json is there;
            or a bundle; None for this machine.
        target: NAME[@SOFTWARE]; None for this machine's, or the bundle's own.
        asked: fields of a recipe: quant, dtype, attention, context, batch.
        offline: take a hub id from the cache alone.
        found: the facts of this machine, instead of looking.

    Returns:
        What was found; a refusal is a finding.

    Raises:
        UsageError: what is asked for does not exist, or has no meaning for the subject.
    """
    wanted = parse_target(target) if target is not None else None
    found = found or probe()
    asked = asked or {}
    if subject is None:
        _refuse_options(asked, (), "without MODEL or BUNDLE")
        return _machine(found, wanted)
    # unlike Path.exists, this takes any text for a name
    if any(os.path.exists(Path(subject, name)) for name in (MANIFEST, MODEL)):
        _refuse_options(asked, _LIMITS, "of a bundle, which is exported already")
        return _bundle(Path(subject), wanted, found, asked)
    return _model(subject, wanted or _own_target(found), found, asked, offline)


def _refuse_options(asked: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for name in asked:
        if name not in allowed:
            raise UsageError(
                expected=f"no --{name} {where}", came="it was given", todo="leave it out"
            )


def _own_target(found: Probe) -> Target:
    """What this machine is; a machine without a GPU is a CPU."""
    target = matching_target(found)
    if target is not None:
        return target
    if found.gpu is None and found.l4t is None:
        return parse_target("cpu")
    raise UsageError(
        expected="a --target, as this machine's GPU or software is of none",
        came="none was named",
        todo="choose one of edgeattn targets; edgeattn doctor alone says what this machine is",
    )


def _machine(found: Probe, wanted: Target | None) -> Diagnosis:
    target = wanted or matching_target(found)
    findings = [*machine_findings(found, target), *tool_findings(wanted, plugins=True)]
    return Diagnosis(None, target.name if target else None, tuple(findings), found)


def _model(
    model: str | Path, target: Target, found: Probe, asked: Mapping[str, Any], offline: bool
) -> Diagnosis:
    recipe = Recipe.from_dict({**asked, "target": target.name})
    findings, memory, choices = doctor_model.examine(model, recipe, target, found, offline=offline)
    findings += machine_findings(found, target)
    findings += tool_findings(target, plugins=recipe.attention_request is not None)
    return Diagnosis(str(model), target.name, tuple(findings), found, memory, tuple(choices))


def _bundle(path: Path, wanted: Target | None, found: Probe, asked: Mapping[str, Any]) -> Diagnosis:
    opened = doctor_bundle.open_bundle(path)
    if isinstance(opened, Finding):
        return Diagnosis(str(path), wanted.name if wanted else None, (opened,), found)
    try:
        target = wanted or matching_target(found) or parse_target(opened.manifest.target.name)
        limits = {name: asked.get(name) for name in _LIMITS}
        findings, memory = doctor_bundle.examine(opened, target, found, **limits)
    except EdgeattnError as error:
        finding = refused("bundle", error)
        return Diagnosis(str(path), wanted.name if wanted else None, (finding,), found)
    findings += machine_findings(found, target)
    return Diagnosis(str(path), target.name, tuple(findings), found, memory)
