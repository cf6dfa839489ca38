"""Checkpoints: written whole or not at all, read without running their code, refused with a sentence."""

import os

import pytest
import torch


def detector(nb, classes=("RBC", "WBC", "Platelets"), seed=0):
    """The content of a best_model.pth with random weights in half precision, and the model."""
    torch.manual_seed(seed)
    model = nb.SSD300(len(classes) + 1)
    names = ("PRIOR_SCALES", "PRIOR_RATIOS", "PRIOR_BASE_RATIO")
    content = {
        "kind": "detector",
        "class_names": list(classes),
        "configuration": {name: getattr(nb, name) for name in names},
        "model": {key: value.half() for key, value in model.state_dict().items()},
    }
    return content, model


@pytest.fixture(scope="module")
def saved(nb, tmp_path_factory):
    """A detector of three classes on disk: (path, its content)."""
    content, _ = detector(nb)
    path = tmp_path_factory.mktemp("saved") / "best_model.pth"
    nb.save_atomically(content, path)
    return path, content


def test_what_is_saved_comes_back(nb, saved):
    path, content = saved
    model, names = nb.load_detector(path)
    assert names == ["RBC", "WBC", "Platelets"] and not model.training
    state = model.state_dict()
    assert set(state) == set(content["model"])
    for key, value in content["model"].items():
        assert state[key].dtype == torch.float32 and torch.equal(state[key], value.float())
    assert path.stat().st_size < 50e6
    assert [p.name for p in path.parent.iterdir()] == ["best_model.pth"]


class Explodes:
    """Fails in the middle of being pickled."""

    def __reduce__(self):
        raise OSError("no space left on device")


def test_a_failed_write_leaves_the_old_file(nb, tmp_path):
    path = tmp_path / "last.pth"
    nb.save_atomically({"kind": "training", "epoch": 3}, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="no space"):
        nb.save_atomically(
            {"kind": "training", "tensor": torch.zeros(1000), "bad": Explodes()}, path
        )
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_failed_rename_leaves_the_old_file(nb, tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    nb.save_atomically("old", path)

    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="read-only"):
        nb.save_atomically("new", path)
    monkeypatch.undo()
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_the_folder_is_made(nb, tmp_path):
    nb.save_atomically("text", tmp_path / "a" / "b" / "metrics.json")
    assert (tmp_path / "a" / "b" / "metrics.json").read_text() == "text"


def refused(nb, path, load=None):
    """The message of the CheckpointError that loading the path gives."""
    with pytest.raises(nb.CheckpointError) as caught:
        (load or nb.load_detector)(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused(nb, saved, tmp_path, share):
    whole = saved[0].read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(nb, path)


def test_other_files_are_refused(nb, tmp_path):
    refused(nb, tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    refused(nb, tmp_path / "text.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    refused(nb, tmp_path / "list.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pth")
    refused(nb, tmp_path / "state.pth")
    torch.save({"kind": "training"}, tmp_path / "kind.pth")
    refused(nb, tmp_path / "kind.pth")


class Attack:
    """Would write a file when unpickled by a loader that runs code."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_code_in_a_checkpoint_is_not_run(nb, tmp_path):
    target = tmp_path / "pwned"
    torch.save({"kind": "detector", "model": Attack(str(target))}, tmp_path / "evil.pth")
    refused(nb, tmp_path / "evil.pth")
    assert not target.exists()


def test_a_foreign_head_is_refused(nb, saved, tmp_path):
    """Class names that do not fit the head, and a head of another shape."""
    _, content = saved
    torch.save({**content, "class_names": ["RBC", "WBC"]}, tmp_path / "names.pth")
    refused(nb, tmp_path / "names.pth")
    weights = dict(content["model"])
    weights["conf.0.weight"] = weights["conf.0.weight"][:-4]
    torch.save({**content, "model": weights}, tmp_path / "head.pth")
    refused(nb, tmp_path / "head.pth")
    del weights["conf.0.weight"]
    torch.save({**content, "model": weights}, tmp_path / "part.pth")
    refused(nb, tmp_path / "part.pth")


def test_finetuning_keeps_the_outputs_of_classes_of_the_same_name(nb, saved):
    """From RBC, WBC, Platelets to Platelets, Parasite, RBC: the same locs, and scores of all but Parasite."""
    path, _ = saved
    old, _ = nb.load_detector(path)
    torch.manual_seed(9)
    model = nb.SSD300(4).eval()
    fresh = model.conf[0].weight.detach().clone()
    kept = nb.start_from(model, path, ["Platelets", "Parasite", "RBC"])
    assert sorted(kept) == ["Platelets", "RBC"]
    images = torch.randn(1, 3, 300, 300) * 30
    with torch.no_grad():
        (locs, scores), (old_locs, old_scores) = model(images), old(images)
    assert torch.allclose(locs, old_locs, atol=1e-5)
    for new, before in ((0, 0), (1, 3), (3, 1)):
        assert torch.allclose(scores[..., new], old_scores[..., before], atol=1e-5)
    parasite = model.conf[0].weight.view(-1, 4, 512, 3, 3)[:, 2]
    assert torch.equal(parasite, fresh.view(-1, 4, 512, 3, 3)[:, 2])


def test_finetuning_to_another_number_of_classes(nb, saved):
    model = nb.SSD300(2).eval()
    assert nb.start_from(model, saved[0], ["Cell"]) == []
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 300, 300))[1].shape == (1, 8732, 2)
