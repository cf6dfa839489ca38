"""Training: schedule, steps that add up, exact resume, what is reused when, and a small run that learns."""

import math

import pytest
import torch


@pytest.fixture
def tiny(nb, monkeypatch, drawn_bccd):
    """Settings for a run of seconds; the first three drawn training smears and one validation batch."""
    for name, value in {"BATCH_SIZE": 2, "SAVE_EVERY": 2, "WARMUP_EPOCHS": 0.5, "LEARNING_RATE": 1e-3}.items():
        monkeypatch.setattr(nb, name, value)
    for name in ("SSD_BATCH_DIVISOR", "SSD_RUN_ID", "SSD_TRAINING"):
        monkeypatch.delenv(name, raising=False)
    if not hasattr(nb, "VERSIONS"):  # made by a cell that is no definition
        monkeypatch.setattr(nb, "VERSIONS", {}, raising=False)
    root = nb.dataset_root(drawn_bccd)
    train = torch.utils.data.Subset(nb.SmearSplit(root, "train"), range(3))
    validation = nb.SmearDataset(nb.SmearSplit(root, "val"), 300)
    return nb.SmearDataset(train, nb.WORKING_SIZE), [validation.batch([0, 1])]


def new_run(nb, train, epochs=2, recipe="r"):
    images = nb.normalize(nb.SmearDataset(train.split, 300).batch([0])[0])
    model = nb.build_model(4, None, images, seed=0)
    return nb.Run(model, epochs, torch.float32, torch.device("cpu"), recipe, "scratch")


def weights(run):
    return [p.detach().clone() for p in run.trained] + [p.clone() for p in run.averaged]


def test_the_learning_rate_warms_up_and_falls_to_zero(nb, monkeypatch):
    monkeypatch.setattr(nb, "LEARNING_RATE", 0.1)
    monkeypatch.setattr(nb, "WARMUP_EPOCHS", 1.0)
    rates = [nb.rate_at(i / 10, 5) for i in range(51)]
    assert rates[0] < 0.02 and rates[10] == pytest.approx(0.1)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:-1], rates[11:], strict=True))
    assert rates[30] == pytest.approx(0.05) and rates[-1] == pytest.approx(0, abs=1e-9)  # half way down the cosine
    assert all(math.isfinite(nb.rate_at(i / 10, 1)) for i in range(11))


def test_biases_learn_twice_as_fast_and_do_not_decay(nb):
    model = nb.SSD300(4)
    groups = nb.make_optimizer(model).param_groups
    by_size = {len(group["params"]): group for group in groups}
    assert sum(by_size) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        is_bias = [names[id(p)].endswith("bias") or names[id(p)] == "scale" for p in group["params"]]
        assert all(is_bias) or not any(is_bias)
        assert (group["factor"], group["weight_decay"]) == ((2.0, 0.0) if is_bias[0] else (1.0, nb.WEIGHT_DECAY))


def test_micro_batches_take_the_same_step(nb, tiny):
    """A batch in halves moves the weights as the whole batch does."""
    train, _ = tiny
    batch = nb.SmearDataset(train.split, 300).batch([0, 1])
    ends = []
    for divisor in (1, 2):
        run = new_run(nb, train)
        run.divisor = divisor
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-3
        terms = nb.optimisation_step(run, batch[0].float(), batch[1], batch[2])
        ends.append((terms, weights(run)))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-4)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)


def test_validation_measures_the_averaged_weights_and_leaves_the_trained_ones(nb, tiny):
    """The loss is that of a second model holding the averages in half precision; the run is as before, bit for bit."""
    train, batches = tiny
    run = new_run(nb, train)
    g = torch.Generator().manual_seed(0)
    for averaged in run.averaged:
        averaged += 0.01 * averaged.abs().mean() * torch.randn(averaged.shape, generator=g)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    got = nb.validate(run, batches)
    assert all(torch.equal(before[key], value) for key, value in run.model.state_dict().items())

    twin = nb.SSD300(4)
    twin.load_state_dict(before)
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, averaged in zip(names, run.averaged, strict=True):
            twin.get_parameter(name).copy_(averaged)
        for parameter in twin.parameters():
            parameter.copy_(parameter.half())
        images, boxes, labels = batches[0]
        loss = nb.MultiBoxLoss(twin.priors)(*twin(nb.normalize(images)), boxes, labels)
    assert got == pytest.approx([loss["localization"].item(), loss["confidence"].item()], rel=1e-4)
    state = nb.averaged_state(run)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key].float(), value) for key, value in twin.state_dict().items())


def test_the_estimate_of_epochs_leaves_no_trace(nb, tiny):
    train, batches = tiny
    run = new_run(nb, train, epochs=7)
    before, state = weights(run), torch.get_rng_state()
    assert nb.epochs_that_fit(run, train, batches, minutes=0)[0] == 1
    epochs, seconds = nb.epochs_that_fit(run, train, batches, minutes=1e6)
    assert epochs == 7 and 0 < seconds < math.inf
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    assert not run.optimizer.state and torch.equal(state, torch.get_rng_state())


def test_out_of_memory_halves_the_micro_batch_and_goes_on(nb, tiny, monkeypatch, capsys):
    train, _ = tiny
    run = new_run(nb, train)
    batch = nb.SmearDataset(train.split, 300).batch([0, 1])
    real = nb.optimisation_step

    def short_of_memory(run, images, boxes, labels):
        if run.divisor < 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(run, images, boxes, labels)

    monkeypatch.setattr(nb, "optimisation_step", short_of_memory)
    terms = nb.step_in_memory(run, batch[0].float(), batch[1], batch[2])
    assert run.divisor == 2 and torch.isfinite(terms).all()
    assert "memory" in capsys.readouterr().out.lower()

    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(nb, "optimisation_step", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        nb.step_in_memory(run, batch[0].float(), batch[1], batch[2])


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_killed(nb, tiny, tmp_path):
    train, batches = tiny
    whole = new_run(nb, train)
    nb.training_loop(whole, train, batches, tmp_path / "whole")

    killed = new_run(nb, train)

    class Killed(Exception):
        pass

    def kill(history):
        if len(history) == 1:
            raise Killed

    with pytest.raises(Killed):
        nb.training_loop(killed, train, batches, tmp_path / "killed", kill)
    torch.manual_seed(12345)  # another process, another state of chance
    resumed = new_run(nb, train)
    nb.restore(resumed, nb.load_checkpoint(tmp_path / "killed" / "last.pth", "training"))
    assert resumed.epoch == 1
    nb.training_loop(resumed, train, batches, tmp_path / "killed")

    assert resumed.steps == whole.steps == 4
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "memory_gb")} == {
            k: v for k, v in b.items() if k not in ("seconds", "memory_gb")
        }
    assert (tmp_path / "whole" / "ssd300_epoch_2.pth").is_file()
    model, names = nb.load_detector(tmp_path / "whole" / "ssd300_epoch_2.pth")
    assert names == nb.CLASS_NAMES


def test_it_learns_and_keeps_the_epoch_with_the_lowest_validation_loss(nb, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nb, "NUM_EPOCHS", 3)
    train, batches = tiny
    run = new_run(nb, train, epochs=3)
    seen = []
    nb.training_loop(run, train, batches, tmp_path, lambda history: seen.append(len(history)))
    assert seen == [1, 2, 3]
    losses = [row["val_localization"] + row["val_confidence"] for row in run.history]
    assert losses[-1] < losses[0]
    assert run.best["epoch"] == losses.index(min(losses)) + 1 and run.best["loss"] == min(losses)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    for word in ("1/3", "train", "loc", "conf", "val", "lr", " s ", "GB", "left", "min"):
        assert word in lines[0]
    # the loss of the saved epoch is that of the half-precision weights in the file, by the unmodified loss
    content = nb.detector_content(run, run.best["model"], run.best["epoch"])
    nb.save_atomically(content, tmp_path / "best_model.pth")
    model, _ = nb.load_detector(tmp_path / "best_model.pth")
    images, boxes, labels = batches[0]
    with torch.no_grad():
        loss = nb.MultiBoxLoss(nb.create_prior_boxes(), 0.5, 3)(*model(nb.normalize(images)), boxes, labels)
    assert sum(value.item() for value in loss.values()) == pytest.approx(run.best["loss"], rel=1e-4)


def test_a_loss_that_is_not_a_number_stops_with_a_sentence(nb, tiny, tmp_path, monkeypatch):
    train, batches = tiny
    run = new_run(nb, train)
    monkeypatch.setattr(nb, "train_epoch", lambda run, dataset: ((math.nan, 1.0), 1e-3))
    with pytest.raises(nb.StudyError, match="LEARNING_RATE"):
        nb.training_loop(run, train, batches, tmp_path)
    assert not (tmp_path / "last.pth").exists()


# --- what is reused when


def place(nb, folder, training=None, detector=None):
    """Checkpoints with just the entries that planning reads."""
    if training:
        nb.save_atomically({"kind": "training", "run_id": "", "epochs": 5, **training}, folder / "last.pth")
    if detector:
        nb.save_atomically({"kind": "detector", **detector}, folder / "best_model.pth")


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, DONE = {"recipe": "r", "epoch": 3}, {"recipe": "r", "epoch": 5}
PLANS = [
    # mode, device, training, detector, run id -> plan
    ("auto", CPU, None, None, "", "train"),
    ("auto", CPU, None, {"recipe": "r"}, "", "reuse"),
    ("auto", CUDA, None, {"recipe": "r"}, "", "train"),
    ("auto", CPU, HALF, {"recipe": "r"}, "", "resume"),
    ("auto", CUDA, HALF, None, "", "resume"),
    ("auto", CPU, DONE, {"recipe": "r"}, "", "reuse"),
    ("auto", CPU, DONE, None, "", "resume"),  # trained to the end, killed before best_model.pth was written
    ("auto", CPU, {"recipe": "other", "epoch": 3}, {"recipe": "other"}, "", "train"),
    ("reuse", CUDA, None, {"recipe": "r"}, "", "reuse"),
    ("fresh", CPU, HALF, {"recipe": "r"}, "", "train"),
    ("fresh", CPU, {**HALF, "run_id": "a"}, None, "a", "resume"),
    ("fresh", CPU, {**HALF, "run_id": "a"}, None, "b", "train"),
    ("fresh", CPU, {**HALF, "run_id": "a", "recipe": "other"}, None, "a", "train"),
]


@pytest.mark.parametrize(("mode", "device", "training", "detector", "run_id", "plan"), PLANS)
def test_train_resume_or_reuse(nb, tmp_path, mode, device, training, detector, run_id, plan):
    place(nb, tmp_path, training, detector)
    got, content = nb.plan_training(mode, tmp_path, "r", device, run_id)
    assert got == plan
    assert (content is None) == (plan == "train")


def test_reuse_of_nothing_is_refused(nb, tmp_path):
    with pytest.raises(nb.CheckpointError, match=r"best_model\.pth"):
        nb.plan_training("reuse", tmp_path, "r", CPU)


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(nb, tmp_path, capsys):
    nb.save_atomically({"kind": "training", "run_id": "", "epochs": 5, **HALF}, tmp_path / "previous.pth")
    (tmp_path / "last.pth").write_bytes((tmp_path / "previous.pth").read_bytes()[:200])
    plan, content = nb.plan_training("auto", tmp_path, "r", CPU)
    assert plan == "resume" and content["epoch"] == 3
    assert "last.pth" in capsys.readouterr().out


# --- what makes two trainings the same


def test_prose_does_not_change_the_recipe_but_code_and_data_do(nb, tmp_path, drawn_bccd):
    import shutil

    root = shutil.copytree(drawn_bccd, tmp_path / "copy") / "BCCD"
    constants = dict(vars(nb))

    def digest(**changed):
        return nb.recipe_digest({**constants, **changed}, [nb.SmearSplit(root, "train")])

    first = digest()
    assert len(first) == 16 and first == digest()
    assert first == digest(DATA_DIR="elsewhere", MY_IMAGES="x", SHOW_SCORE=0.3, TRAINING="fresh", CPU_MINUTES=3)
    assert first != digest(LEARNING_RATE=0.5) and first != digest(SEED=nb.SEED + 1)
    path = root / "Annotations" / "Smear_00000.xml"
    path.write_text(path.read_text().replace("<truncated>0", "<truncated>1", 1))
    assert first != digest()


def test_plain_code_ignores_comments_and_docstrings_only(nb):
    plain = nb.plain_code('def f(a):\n    """Says this."""\n    # and that\n    return a + 1  # one\n')
    other = nb.plain_code('def f(a):\n    """Says something\n    else."""\n\n    return a + 1\n')
    assert plain == other
    assert plain != nb.plain_code("def f(a):\n    return a + 2\n")
    assert nb.plain_code('x = "# no comment"\n') != nb.plain_code('x = "# no"\n')
