"""Every patch of other packages' private code, one function each.

Each states what it reaches into and what it saves; `tests/test_upstream.py` guards it. Where
upstream has changed, a patch steps aside with one log line: the results stay the same, with more
memory or more messages.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)
_one_thread = threading.RLock()  # patches belong to the process; taken before the lock in `quiet`


def telemetry_off() -> None:
    """Keep OpenVINO and NNCF from reporting usage, without touching environment or home folder.

    Both look for the optional package `openvino_telemetry` and do without it where it is missing.
    `None` in `sys.modules` is Python's own way to mark a module as missing, so that nothing that
    could open a connection is ever loaded. (`CI=true`, the other way, changes unrelated tools.)
    If `openvino` was imported first, consent is revoked on the telemetry object that it created.

    Reaches into: `openvino_telemetry.utils.opt_in_checker.OptInChecker.check`, in the second case.
    """
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None
    if sys.modules["openvino_telemetry"] is None:
        return
    try:
        from openvino_telemetry.utils.opt_in_checker import ConsentCheckResult, OptInChecker

        OptInChecker.check = lambda *args, **kwargs: ConsentCheckResult.DECLINED
    except (ImportError, AttributeError, TypeError) as error:
        _step_aside("revoking consent to telemetry", error)
    try:
        sys.modules["openvino_telemetry"].Telemetry().consent = False
    except RuntimeError:
        pass  # nothing has been set up yet
    except (AttributeError, TypeError) as error:
        _step_aside("revoking consent to telemetry", error)


@contextlib.contextmanager
def trace_in_16_bits(module: Any) -> Iterator[None]:
    """Let OpenVINO trace `module` without reading its large weights; undo that afterwards.

    OpenVINO's 16-bit patch puts placeholders in place of the weights of linear layers and
    embeddings, so that tracing computes shapes only, and hands the stored weights to the graph
    unchanged. XL converts in 2 GB.

    Reaches into: `openvino.frontend.pytorch.patch_model`, whose `unpatch_model` wants the name of
    an attribute, and optimum's `clear_class_registry` (TorchScript remembers what it has traced,
    and holds its weights). Optimum-intel does the same (`exporters/openvino/convert.py`).
    """
    with _one_thread:
        try:
            from openvino.frontend.pytorch import patch_model
            from optimum.exporters.openvino.utils import clear_class_registry

            unpatch = patch_model.unpatch_model
            getattr(patch_model, "__make_16bit_traceable")(module)
        except (ImportError, AttributeError) as error:
            _step_aside("tracing in 16 bits", error)
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
            yield
            return
        try:
            yield
        finally:
            unpatch(module, "_openvino_module_extension_patch_orig_forward")
            clear_class_registry()


@contextlib.contextmanager
def free_weights_while_compressing(
    report: Callable[[str], None] = lambda stage: None,
) -> Iterator[None]:
    """Let NNCF drop each weight as soon as it is compressed, and report the share that is done.

    NNCF compresses one weight after the other, the largest first, but keeps all of them in a
    mapping of names. Without it, T5-XXL to INT8 takes 14 GB instead of 5.7.

    Reaches into: `OVWeightCompressionAlgoBackend.transform_model`, `name_to_node_mapping` and the
    layer attributes of its weights.
    """
    try:
        from nncf.quantization.algorithms.weight_compression import openvino_backend

        backend = openvino_backend.OVWeightCompressionAlgoBackend
        original = vars(backend)["transform_model"]
    except (ImportError, AttributeError, KeyError) as error:
        _step_aside("freeing weights while compressing", error)
        yield
        return

    def transform_model(self, model, graph, weight_compression_parameters, *args, **kwargs):
        weights = list(weight_compression_parameters)

        def one_by_one() -> Iterator[Any]:
            sizes = [getattr(weight, "num_weights", 1) for weight in weights]
            done, total, known = 0, sum(sizes), True
            for weight, size in zip(weights, sizes, strict=True):
                report(f"compressing weights, {done / total:.0%}")
                yield weight
                known = known and _forget_weight(self, weight)
                done += size

        return original(self, model, graph, one_by_one(), *args, **kwargs)

    with _replaced(backend, "transform_model", transform_model):
        yield


def _forget_weight(backend: Any, weight: Any) -> bool:
    """Drop one weight from NNCF's mapping; False if the mapping is not as expected."""
    try:
        attributes = weight.node_with_weight.layer_attributes.constant_attributes
        del backend.name_to_node_mapping[attributes[weight.weight_port_id]["name"]]
    except (AttributeError, KeyError, TypeError) as error:
        _step_aside("freeing compressed weights", error)
        return False
    return True


@contextlib.contextmanager
def calibration_outputs_first() -> Iterator[None]:
    """Let OpenVINO free activations as soon as NNCF has read them.

    NNCF adds an output for each statistic, behind the model's own. OpenVINO computes outputs in
    their order; with the model's own output first, every activation waits until the end. The other
    way round, DiT XL calibrates at 512² in 9.7 GB instead of 15.4, the VAE decoder in 2.7 instead
    of 9.6.

    Reaches into: `OVModelTransformer._insert_outputs` and NNCF's runtime information.
    """
    try:
        import openvino as ov
        from nncf.openvino.graph.model_transformer import OVModelTransformer
        from nncf.openvino.graph.model_utils import copy_rt_info

        original = vars(OVModelTransformer)["_insert_outputs"].__func__
    except (ImportError, AttributeError, KeyError) as error:
        _step_aside("ordering calibration outputs", error)
        yield
        return

    def insert_outputs(model: ov.Model, outputs: list) -> ov.Model:
        extended, own = original(model, outputs), len(model.get_results())
        results = extended.get_results()
        ordered = ov.Model(
            results[own:] + results[:own],
            extended.get_sinks(),
            extended.get_parameters(),
            extended.get_friendly_name(),
        )
        copy_rt_info(extended, ordered, path=["nncf"])
        return ordered

    with _replaced(OVModelTransformer, "_insert_outputs", staticmethod(insert_outputs)):
        yield


def hide_length_warning(tokenizer: Any) -> None:
    """Mark transformers' warning about long texts as already shown: PixArt's limit differs.

    Reaches into: transformers' `deprecation_warnings`, a dictionary of warnings already given.
    """
    try:
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = (
            True
        )
    except AttributeError as error:
        _step_aside("hiding the tokenizer's own limit", error)


def dispatch_loading(find_class: Callable[..., type | None]) -> None:
    """Let `OVDiffusionPipeline.from_pretrained` hand over to the class that `find_class` returns.

    `find_class(model_id, **hub)`: a pipeline class, or None where optimum is to load the model.
    optimum's own dispatch comes after the conversion, which it cannot do for PixArt, and runs
    nothing but the class's constructor.

    Reaches into: `OVDiffusionPipeline.from_pretrained`, which optimum inherits.
    """
    from optimum.intel.openvino.modeling_diffusion import OVDiffusionPipeline

    hub_names = ("revision", "cache_dir", "token", "local_files_only")

    def from_pretrained(cls: type, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is OVDiffusionPipeline:
            hub = {name: kwargs[name] for name in hub_names if name in kwargs}
            if found := find_class(model_id, **hub):
                return found.from_pretrained(model_id, *args, **kwargs)
        return super(OVDiffusionPipeline, cls).from_pretrained(model_id, *args, **kwargs)

    OVDiffusionPipeline.from_pretrained = classmethod(from_pretrained)


@contextlib.contextmanager
def _replaced(owner: type, name: str, replacement: Any) -> Iterator[None]:
    with _one_thread:
        original = vars(owner)[name]
        setattr(owner, name, replacement)
        try:
            yield
        finally:
            setattr(owner, name, original)


def _step_aside(what: str, error: Exception) -> None:
    logger.warning("%s is left out: upstream has changed (%s).", what, error)
