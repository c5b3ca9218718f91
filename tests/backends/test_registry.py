"""What the registry says of a backend is what the backend is, and nothing heavy is imported to know it."""

import sys

import pytest

from shardes.backends.base import Backend
from shardes.backends.registry import BACKENDS
from shardes.config.loading import parse_config
from shardes.config.schema import RolloutConfig
from shardes.errors import UserError
from tests.helpers.models import tree
from tests.helpers.ranks import run_command


def configured(tmp_path, **changes):
    return parse_config(tree(tmp_path, model="m", run_dir="r", **changes), source="test")


@pytest.mark.parametrize("spec", BACKENDS.values(), ids=BACKENDS)
def test_every_backend_is_a_backend_with_gathers_that_can_be_configured(spec, tmp_path):
    assert issubclass(spec.load(), Backend)
    assert not spec.load().__abstractmethods__
    assert BACKENDS[spec.name] is spec
    assert spec.auto_gather in (None, spec.gathers[0])
    assert (spec.auto_gather is None) == (not spec.auto_reason)
    for gather in ("iteration", "member", "layer"):
        changes = {"parallel__backend": spec.name, "rollout__gather": gather}
        if gather in spec.gathers:
            assert configured(tmp_path, **changes).rollout.gather == gather
        else:
            with pytest.raises(UserError, match=f"supports only {' or '.join(spec.gathers)}; "):
                configured(tmp_path, **changes)
    assert set(spec.gathers) < set(RolloutConfig.model_fields["gather"].annotation.__args__)


def test_an_unknown_backend_is_answered_with_the_nearest_one(tmp_path):
    with pytest.raises(
        UserError, match=r"parallel\.backend: got 'fspd'; did you mean 'fsdp'\? Known"
    ) as caught:
        configured(tmp_path, parallel__backend="fspd")
    assert str(caught.value).endswith(", ".join(BACKENDS))
    with pytest.raises(UserError, match="got 'quux'; Known backends: "):
        configured(tmp_path, parallel__backend="quux")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_deepspeed_file_is_for_backends_that_read_one(name, tmp_path):
    changes = {"parallel__backend": name, "parallel__deepspeed": "ds.json"}
    if BACKENDS[name].uses_deepspeed_file:
        assert configured(tmp_path, **changes).parallel.deepspeed is not None
    else:
        with pytest.raises(UserError, match=f"ds.json is for parallel.backend: zero3; got {name}"):
            configured(tmp_path, **changes)


def test_the_configuration_imports_no_backend():
    heavy = "[name for name in ('torch', 'transformers', 'shardes.backends.base') if name in sys.modules]"
    code = f"import sys, shardes.config.schema; print({heavy})"
    assert run_command([sys.executable, "-c", code]).stdout == "[]\n"
