"""What this machine can build and run, asked of every back end in a process of its own."""

from __future__ import annotations

from pathlib import Path

from fofa_deploy import environment
from fofa_deploy.backend import get_backend
from fofa_deploy.errors import FofaError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.profile import installed_profiles
from fofa_deploy.types import Frozen, Graph, HardwareProfile, Probe, Recipe

SECONDS = 120.0


class Diagnosis(Frozen):
    profile: str
    runtime: str
    probe: Probe


class Diagnoses(Frozen):
    all: tuple[Diagnosis, ...]


class Question(Frozen):
    profiles: tuple[HardwareProfile, ...]


def probe(profile: HardwareProfile) -> Probe:
    """A back end's own answer, and what the machine says of itself: both must agree that the profile's device is here."""
    found = get_backend(profile.runtime).probe(profile)
    away = environment.mismatch(profile)
    return found.model_copy(update={"can_run": False, "reason": away}) if away and found.can_run else found


def ask(question: Question) -> Diagnoses:
    """Probe profiles of one runtime; runs in a child process."""
    return Diagnoses(all=tuple(Diagnosis(profile=p.name, runtime=p.runtime, probe=probe(p)) for p in question.profiles))


def diagnose() -> list[Diagnosis]:
    """Every installed profile. A back end that crashes or does not import is a line with its reason."""
    profiles = installed_profiles()
    found: list[Diagnosis] = []
    for runtime in sorted({profile.runtime for profile in profiles}):
        mine = tuple(profile for profile in profiles if profile.runtime == runtime)
        try:
            found += run_isolated("fofa_deploy.diagnosis:ask", Question(profiles=mine), Diagnoses, seconds=SECONDS).all
        except FofaError as error:
            silent = Probe(can_build=False, can_run=False, reason=error.message.splitlines()[0])
            found += [Diagnosis(profile=profile.name, runtime=runtime, probe=silent) for profile in mine]
    return found


class OfferRequest(Frozen):
    graph: Path
    profile: HardwareProfile


class Offer(Frozen):
    """What a back end makes of a profile and a graph, here and now."""

    probe: Probe
    recipes: tuple[Recipe, ...]


def offer(request: OfferRequest) -> Offer:
    """Runs in a child process."""
    found = probe(request.profile)
    if not found.can_build:
        return Offer(probe=found, recipes=())
    recipes = get_backend(request.profile.runtime).recipes(request.profile, Graph.load(request.graph))
    return Offer(probe=found, recipes=tuple(r for r in recipes if r.precision in request.profile.precisions))
