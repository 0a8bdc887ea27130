"""`summarize_models` states what is on disk and what goes in and out."""

import ov_pixart_helper as helper
from tests.support.refused import refused


def test_every_component_is_a_row_with_its_weights_inputs_and_output(converted):
    folder = converted("alpha")
    table = helper.summarize_models(folder)
    assert list(table.index) == list(helper.COMPONENTS)
    assert "quality" not in table.columns  # nothing has been measured
    for name, row in table.iterrows():
        weights = (folder / name / "openvino_model.bin").stat().st_size
        assert row["size, MB"] == round(weights / 1e6, 2)
    assert table.loc["text_encoder", "inputs"] == "input_ids (?, ?), attention_mask (?, ?)"
    assert table.loc["transformer", "inputs"].startswith("hidden_states (?, 4, ?, ?), ")
    assert table.loc["transformer", "output"] == "sample (?, ?, ?, ?)"
    assert table.loc["vae_decoder", "output"] == "sample (?, 3, ?, ?)"


def test_components_that_are_missing_are_left_out(converted, tmp_path):
    (tmp_path / "vae_decoder").symlink_to(converted("alpha") / "vae_decoder")
    assert list(helper.summarize_models(tmp_path).index) == ["vae_decoder"]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with refused(FileNotFoundError, f"ov_dir={str(tmp_path)!r}", "convert one first"):
        helper.summarize_models(tmp_path)
