"""Patches of other packages: each does its work, and where upstream has changed it steps aside.

Stepping aside means one log line and the same results.
"""

import copy
import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import openvino as ov
import pytest
import torch
from nncf.openvino.graph.model_transformer import OVModelTransformer
from nncf.quantization.algorithms.weight_compression import openvino_backend
from openvino.frontend.pytorch import patch_model
from optimum.exporters.openvino import utils as optimum_utils
from optimum.intel.openvino import OVDiffusionPipeline, OVStableDiffusionPipeline

from ov_pixart import upstream
from ov_pixart.compress import compress_to_8_bits
from ov_pixart.ir import constants, read_ir
from ov_pixart.trace import trace_transformer, traceable
from tests.support.checkpoints import build_transformer

BACKEND = openvino_backend.OVWeightCompressionAlgoBackend


@pytest.fixture
def log(caplog):
    """`log()`: the lines of ov_pixart.upstream so far."""
    caplog.set_level(logging.INFO, logger="ov_pixart.upstream")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "ov_pixart.upstream"]


def test_loading_is_handed_over_to_the_class_that_is_found(monkeypatch, tmp_path):
    class Found:
        from_pretrained = staticmethod(lambda *args, **kwargs: (args, kwargs))

    loader = OVDiffusionPipeline
    monkeypatch.setattr(loader, "from_pretrained", loader.from_pretrained)  # undone afterwards
    asked = []
    upstream.dispatch_loading(lambda name, **hub: asked.append(hub) or (name == "pixart" and Found))
    options = {"device": "CPU", "revision": "main"}
    assert loader.from_pretrained("pixart", True, **options) == (("pixart", True), options)
    assert asked == [{"revision": "main"}]
    for other in (loader, OVStableDiffusionPipeline):
        with pytest.raises(ValueError, match="Repo id"):
            other.from_pretrained(str(tmp_path / "nowhere"))
    assert len(asked) == 2


def assert_one_line(lines: list[str], start: str) -> None:
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{start} is left out: upstream has changed")
    assert "\n" not in lines[0]


def bytes_of(model: ov.Model) -> list[bytes]:
    return [one.tobytes() for one in constants(model)]


# ---- telemetry ----------------------------------------------------------------------------------


def fake_telemetry(monkeypatch, **attributes) -> ModuleType:
    """`openvino_telemetry`, as if openvino had imported it first."""
    telemetry = ModuleType("openvino_telemetry")
    vars(telemetry).update(attributes)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", telemetry)
    for name in ("utils", "utils.opt_in_checker"):
        module = ModuleType(f"openvino_telemetry.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return sys.modules["openvino_telemetry.utils.opt_in_checker"]


def test_telemetry_is_marked_as_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    upstream.telemetry_off()
    assert sys.modules["openvino_telemetry"] is None
    with pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401


def test_telemetry_that_was_there_first_loses_its_consent(monkeypatch, log):
    singleton = SimpleNamespace(consent=True)
    checker = fake_telemetry(monkeypatch, Telemetry=lambda: singleton)
    checker.ConsentCheckResult = SimpleNamespace(DECLINED="declined")
    checker.OptInChecker = type("OptInChecker", (), {"check": lambda self: "accepted"})
    upstream.telemetry_off()
    assert checker.OptInChecker().check(True) == "declined"
    assert singleton.consent is False
    assert not log()


def test_telemetry_steps_aside(monkeypatch, log):
    singleton = SimpleNamespace(consent=True)
    fake_telemetry(monkeypatch, Telemetry=lambda: singleton)  # without OptInChecker
    upstream.telemetry_off()
    assert_one_line(log(), "revoking consent to telemetry")
    assert singleton.consent is False  # by the public way


def test_telemetry_without_its_public_class_steps_aside(monkeypatch, log):
    checker = fake_telemetry(monkeypatch)  # without Telemetry
    checker.ConsentCheckResult = SimpleNamespace(DECLINED="declined")
    checker.OptInChecker = type("OptInChecker", (), {})
    upstream.telemetry_off()
    assert_one_line(log(), "revoking consent to telemetry")


# ---- tracing in 16 bits -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_transformer(32, conditions=False).half()


def trace(dit: torch.nn.Module) -> ov.Model:
    with traceable(dit, keep_float32=False):
        return trace_transformer(dit)


def predict(model: ov.Model) -> np.ndarray:
    random = np.random.default_rng(0)
    inputs = {
        "hidden_states": random.standard_normal((1, 4, 8, 8), np.float32),
        "timestep": np.float32([500]),
        "encoder_hidden_states": random.standard_normal((1, 5, 32), np.float32),
        "encoder_attention_mask": np.ones((1, 5), np.int64),
    }
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    return ov.Core().compile_model(model, "CPU", config)(inputs)[0]


def test_tracing_in_16_bits_keeps_the_stored_weights_and_restores_the_module(dit, log):
    module = copy.deepcopy(dit)
    stored = {name: value.clone() for name, value in module.state_dict().items()}
    linear = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
    with upstream.trace_in_16_bits(module):
        assert linear.weight.dtype == torch.float32  # a placeholder
    assert linear.weight.dtype == torch.float16
    assert linear.forward.__func__ is torch.nn.Linear.forward
    for name, value in module.state_dict().items():  # convolutions and the like are widened
        assert torch.equal(value.float(), stored[name].float()), name
    assert not log()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (patch_model, "__make_16bit_traceable"),
        (patch_model, "unpatch_model"),
        (optimum_utils, "clear_class_registry"),
    ],
)
def test_tracing_in_16_bits_steps_aside(dit, log, monkeypatch, owner, name):
    expected = predict(trace(copy.deepcopy(dit)))
    monkeypatch.delattr(owner, name)
    found = predict(trace(copy.deepcopy(dit)))
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)
    assert_one_line(log(), "tracing in 16 bits")


# ---- weights in NNCF ----------------------------------------------------------------------------


def compress(converted, report=lambda stage: None) -> ov.Model:
    model = read_ir(converted("alpha") / "transformer")
    with upstream.free_weights_while_compressing(report):
        return compress_to_8_bits(model, set())


def test_each_weight_is_dropped_as_soon_as_it_is_compressed(converted, monkeypatch, log):
    names, stages, forget = [], [], BACKEND.transform_model

    def watch(self, model, graph, weights, *args, **kwargs):
        def counted():
            for weight in weights:
                names.append(len(self.name_to_node_mapping))
                yield weight

        return forget(self, model, graph, counted(), *args, **kwargs)

    monkeypatch.setattr(BACKEND, "transform_model", watch)
    compress(converted, stages.append)
    assert names == list(range(names[0], names[0] - len(names), -1))  # one fewer each time
    assert stages[0] == "compressing weights, 0%"
    shares = [int(stage.split()[-1].rstrip("%")) for stage in stages]
    assert shares == sorted(shares)
    assert shares[-1] > 90
    assert BACKEND.transform_model is watch  # put back
    assert not log()


def test_freeing_weights_steps_aside(converted, monkeypatch, log):
    expected = bytes_of(compress(converted))
    model = read_ir(converted("alpha") / "transformer")
    with monkeypatch.context() as patch:
        patch.delattr(openvino_backend, "OVWeightCompressionAlgoBackend")
        with upstream.free_weights_while_compressing():
            patch.undo()  # NNCF itself needs the class
            assert bytes_of(compress_to_8_bits(model, set())) == expected
    assert_one_line(log(), "freeing weights while compressing")


def test_freeing_weights_steps_aside_once_where_they_are_kept_elsewhere(
    converted, monkeypatch, log
):
    expected, original = bytes_of(compress(converted)), BACKEND.transform_model

    class Mapping(dict):
        def __delitem__(self, name):
            raise KeyError(name)

    def undeletable(self, *args, **kwargs):
        self.name_to_node_mapping = Mapping(self.name_to_node_mapping)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(BACKEND, "transform_model", undeletable)
    assert bytes_of(compress(converted)) == expected
    assert_one_line(log(), "freeing compressed weights")


# ---- outputs in NNCF ----------------------------------------------------------------------------


def extend(converted) -> ov.Model:
    """The DiT with outputs for three statistics."""
    model = read_ir(converted("alpha") / "transformer")
    products = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
    with upstream.calibration_outputs_first():
        return OVModelTransformer._insert_outputs(
            model, [(op.output(0), 0, None) for op in products[:3]]
        )


def is_models_own(extended: ov.Model) -> list[bool]:
    return ["sample" in output.get_names() for output in extended.outputs]


def test_statistics_come_before_the_models_own_output(converted, log):
    assert is_models_own(extend(converted)) == [False, False, False, True]
    assert not log()


def test_ordering_outputs_steps_aside(converted, monkeypatch, log):
    original = OVModelTransformer.__dict__["_insert_outputs"]
    model = read_ir(converted("alpha") / "transformer")
    product = next(op for op in model.get_ops() if op.get_type_name() == "MatMul")
    with monkeypatch.context() as patch:
        patch.delattr(OVModelTransformer, "_insert_outputs")
        with upstream.calibration_outputs_first():
            patch.undo()
            extended = OVModelTransformer._insert_outputs(model, [(product.output(0), 0, None)])
    assert is_models_own(extended) == [True, False]
    assert OVModelTransformer.__dict__["_insert_outputs"] is original
    assert_one_line(log(), "ordering calibration outputs")


# ---- the tokenizer ------------------------------------------------------------------------------


def test_only_the_tokenizers_own_limit_is_hidden(torch_pipeline, caplog, log):
    tokenizer = copy.deepcopy(torch_pipeline("alpha").tokenizer)
    tokenizer.model_max_length = 3
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            upstream.hide_length_warning(tokenizer)
            ids = tokenizer("a small red circle above the sea").input_ids
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert len(ids) > 3
    assert "longer than" not in caplog.text
    assert not log()


def test_hiding_the_tokenizers_limit_steps_aside(log):
    upstream.hide_length_warning(SimpleNamespace())
    assert_one_line(log(), "hiding the tokenizer's own limit")
