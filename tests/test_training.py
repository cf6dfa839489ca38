"""Training: schedule, steps that add up, exact resume, what is reused, a small run that learns."""

import ast
import inspect
import json
import linecache
import math
import shutil

import nbformat
import pytest
import torch
from conftest import NOTEBOOK, part_of


@pytest.fixture
def tiny(nb, monkeypatch, drawn_bccd):
    """Settings for a run of seconds; three drawn training smears and one validation batch."""
    settings = {
        "BATCH_SIZE": 2,
        "SAVE_EVERY": 2,
        "WARMUP_EPOCHS": 0.5,
        "LEARNING_RATE": 1e-3,
        "PASSES_PER_EPOCH": 1,
    }
    for name, value in settings.items():
        monkeypatch.setattr(nb, name, value)
    for name in ("SSD_BATCH_DIVISOR", "SSD_RUN_ID", "SSD_TRAINING"):
        monkeypatch.delenv(name, raising=False)
    if not hasattr(nb, "VERSIONS"):  # made by a cell that is no definition
        monkeypatch.setattr(nb, "VERSIONS", {}, raising=False)
    root = nb.dataset_root(drawn_bccd)
    train = part_of(nb.SmearSplit(root, "train"), range(3))
    validation = nb.SmearDataset(nb.SmearSplit(root, "val"), 300)
    return nb.SmearDataset(train, nb.WORKING_SIZE), [validation.batch([0, 1])]


def new_run(nb, train, epochs=2, recipe="r"):
    images = nb.normalize(nb.SmearDataset(train.split, 300).batch([0])[0])
    model = nb.build_model(4, None, images, seed=0)
    nb.freeze_blocks(model, nb.FROZEN_BLOCKS)  # as with ImageNet's features
    return nb.Run(model, epochs, torch.float32, CPU, recipe, "features", "features")


def weights(run):
    return [p.detach().clone() for p in run.trained] + [p.clone() for p in run.averaged]


def test_the_learning_rate_warms_up_and_falls_to_zero(nb, monkeypatch):
    monkeypatch.setattr(nb, "LEARNING_RATE", 0.1)
    monkeypatch.setattr(nb, "WARMUP_EPOCHS", 1.0)
    rates = [nb.rate_at(i / 10, 5) for i in range(51)]
    assert rates[0] < 0.02 and rates[10] == pytest.approx(0.1)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:-1], rates[11:], strict=True))
    assert rates[30] == pytest.approx(0.05) and rates[-1] == pytest.approx(
        0, abs=1e-9
    )  # half way down the cosine
    assert all(math.isfinite(nb.rate_at(i / 10, 1)) for i in range(11))


def test_biases_learn_twice_as_fast_and_do_not_decay(nb):
    model = nb.SSD300(4)
    groups = nb.make_optimizer(model).param_groups
    by_size = {len(group["params"]): group for group in groups}
    assert sum(by_size) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        is_bias = [
            names[id(p)].endswith("bias") or names[id(p)] == "scale" for p in group["params"]
        ]
        assert all(is_bias) or not any(is_bias)
        assert (group["factor"], group["weight_decay"]) == (
            (2.0, 0.0) if is_bias[0] else (1.0, nb.WEIGHT_DECAY)
        )


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
        terms = nb.optimisation_step(run, batch[0].float(), *batch[1:])
        ends.append((terms, weights(run)))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-4)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)


def test_validation_measures_the_averaged_weights_and_leaves_the_trained_ones(nb, tiny):
    """The loss is that of a twin holding the averages in half precision; the run stays as is."""
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
        images, boxes, labels, _ = batches[0]
        loss = nb.MultiBoxLoss(twin.priors)(*twin(nb.normalize(images)), boxes, labels)
    assert got == pytest.approx([loss["localization"].item(), loss["confidence"].item()], rel=1e-4)
    state = nb.averaged_state(run)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key].float(), value) for key, value in twin.state_dict().items())


def test_measuring_the_time_leaves_no_trace(nb, tiny):
    train, batches = tiny
    run = new_run(nb, train, epochs=7)
    before, state = weights(run), torch.get_rng_state()
    one_pass, validation = nb.time_training(run, train, batches)
    assert 0 < one_pass < math.inf and 0 < validation < math.inf
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    assert not run.optimizer.state and torch.equal(state, torch.get_rng_state())
    assert (run.epoch, run.steps) == (0, 0)


def test_a_cpu_gives_up_passes_first_and_then_epochs(nb, monkeypatch):
    monkeypatch.setattr(nb, "NUM_EPOCHS", 50)
    monkeypatch.setattr(nb, "PASSES_PER_EPOCH", 4)
    fits = [
        nb.schedule_that_fits(seconds, 10, 2)
        for seconds in (0, 100, 600, 853, 1100, 2099, 2100, 1e9)
    ]
    assert fits == [(1, 1), (8, 1), (50, 1), (50, 1.5), (50, 2), (50, 3.9), (50, 4), (50, 4)]
    for seconds in range(
        20, 2200, 7
    ):  # it fits, and neither a tenth of a pass nor an epoch more would
        epochs, passes = nb.schedule_that_fits(seconds, 10, 2)
        assert epochs * (10 * passes + 2) <= seconds and round(10 * passes) == pytest.approx(
            10 * passes
        )
        assert passes == 4 or 50 * (10 * (passes + 0.1) + 2) > seconds
        assert epochs == 50 or (passes == 1 and (epochs + 1) * 12 > seconds)


def test_an_epoch_passes_over_the_images_as_often_as_asked(nb, tiny, monkeypatch):
    """Every image once a pass, each pass in another order; the rate falls over the epochs."""
    train, _ = tiny
    order = nb.epoch_order(5, 3, torch.Generator().manual_seed(1))
    passes = order.view(3, 5)
    assert all(sorted(one.tolist()) == list(range(5)) for one in passes)
    assert passes.unique(dim=0).shape[0] > 1
    part = nb.epoch_order(4, 1.5, torch.Generator().manual_seed(1)).tolist()
    assert len(part) == 6 and set(part) == {0, 1, 2, 3} and max(map(part.count, part)) == 2
    run, rates = new_run(nb, train), []
    run.passes = 3
    monkeypatch.setattr(nb, "step_in_memory", lambda run, *batch: torch.ones(2))
    monkeypatch.setattr(
        nb, "rate_at", lambda progress, epochs: rates.append((progress, epochs)) or 0.0
    )
    terms, _ = nb.train_epoch(run, train)
    assert (
        run.steps == 5 and run.epoch == 1 and terms == [1.0, 1.0]
    )  # 3 images, 3 passes, batches of 2
    assert rates == [(i / 5, 2) for i in range(5)]


def test_an_interrupted_validation_gives_the_trained_weights_back(nb, tiny, monkeypatch):
    train, batches = tiny
    run = new_run(nb, train)
    for averaged in run.averaged:
        averaged += 1
    before = {key: value.clone() for key, value in run.model.state_dict().items()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(nb.SSD300, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        nb.validate(run, batches)
    assert all(torch.equal(before[key], value) for key, value in run.model.state_dict().items())


def test_skipped_cells_are_learned_and_the_loss_is_told_which_images_are_complete(
    nb, tiny, monkeypatch, tmp_path
):
    """With complete labels: twice the outputs, in the file too; without: the loss gets no flags."""
    train, batches = tiny
    split, other = train.split, part_of(train.split, range(3))
    extra = torch.tensor([[1.0, 1, 30, 30]]), torch.tensor([1])
    other.complete, other.skipped = [None, extra, None], list(other.skipped)
    other.skipped[1] = extra[0], extra[1] + len(nb.CLASS_NAMES)
    told = []
    real = nb.MultiBoxLoss.forward

    def forward(self, locs, scores, boxes, labels, complete=None, positives=None):
        told.append(None if complete is None else complete.tolist())
        return real(self, locs, scores, boxes, labels, complete, positives)

    monkeypatch.setattr(nb.MultiBoxLoss, "forward", forward)
    monkeypatch.setattr(nb, "PRECISION", "float32")
    monkeypatch.setattr(nb, "DEVICE", torch.device("cpu"))
    for known, outputs, flags in ((split, 4, None), (other, 7, [False, True])):
        run = nb.new_run(known)
        assert run.model.num_classes == outputs
        told.clear()
        images, boxes, labels, complete = nb.SmearDataset(known).batch([0, 1])
        nb.optimisation_step(run, images.float(), boxes, labels, complete)
        nb.validate(run, [(images, boxes, labels, complete)])
        assert told == [flags, flags]
        run.history = [{"seconds": 1.0, "memory_gb": 1.0}]
        path = tmp_path / f"{outputs}.pth"
        nb.save_atomically(nb.detector_content(run, nb.averaged_state(run), 1), path)
        assert nb.load_checkpoint(path, "detector")["skipped"] == (outputs == 7)
        assert nb.load_detector(path)[0].num_classes == outputs


def test_out_of_memory_halves_the_micro_batch_and_goes_on(nb, tiny, monkeypatch, capsys):
    train, _ = tiny
    run = new_run(nb, train)
    batch = nb.SmearDataset(train.split, 300).batch([0, 1])
    real = nb.optimisation_step

    def short_of_memory(run, images, *labels):
        if run.divisor < 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(run, images, *labels)

    monkeypatch.setattr(nb, "optimisation_step", short_of_memory)
    terms = nb.step_in_memory(run, batch[0].float(), *batch[1:])
    assert run.divisor == 2 and torch.isfinite(terms).all()
    assert "memory" in capsys.readouterr().out.lower()

    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(nb, "optimisation_step", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        nb.step_in_memory(run, batch[0].float(), *batch[1:])


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_killed(nb, tiny, tmp_path, monkeypatch):
    train, batches = tiny
    monkeypatch.setattr(nb, "DEVICE", torch.device("cpu"))
    whole = new_run(nb, train)
    nb.training_loop(whole, train, batches, tmp_path / "whole")

    killed = new_run(nb, train)

    class Killed(Exception):
        pass

    state_of_chance = []

    def kill(history):
        if len(history) == 1:
            state_of_chance.append(torch.get_rng_state())
            raise Killed

    with pytest.raises(Killed):
        nb.training_loop(killed, train, batches, tmp_path / "killed", kill)
    torch.manual_seed(12345)  # another process, another state of chance
    resumed = nb.resumed_run(
        train.split, nb.load_checkpoint(tmp_path / "killed" / "last.pth", "training")
    )
    assert resumed.epoch == 1 and torch.equal(torch.get_rng_state(), state_of_chance[0])
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


def test_it_learns_and_keeps_the_epoch_with_the_lowest_validation_loss(
    nb, tiny, tmp_path, monkeypatch, capsys
):
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
    # the loss of the saved epoch is that of the weights in the file, by the unmodified loss
    content = nb.detector_content(run, run.best["model"], run.best["epoch"])
    nb.save_atomically(content, tmp_path / "best_model.pth")
    model, _ = nb.load_detector(tmp_path / "best_model.pth")
    images, boxes, labels, _ = batches[0]
    with torch.no_grad():
        loss = nb.MultiBoxLoss(nb.create_prior_boxes(), 0.5, 3)(
            *model(nb.normalize(images)), boxes, labels
        )
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
        nb.save_atomically(
            {"kind": "training", "run_id": "", "epochs": 5, **training}, folder / "last.pth"
        )
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
    (
        "auto",
        CPU,
        DONE,
        None,
        "",
        "resume",
    ),  # trained to the end, killed before best_model.pth was written
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
    nb.save_atomically(
        {"kind": "training", "run_id": "", "epochs": 5, **HALF}, tmp_path / "previous.pth"
    )
    (tmp_path / "last.pth").write_bytes((tmp_path / "previous.pth").read_bytes()[:200])
    plan, content = nb.plan_training("auto", tmp_path, "r", CPU)
    assert plan == "resume" and content["epoch"] == 3
    assert "last.pth" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["training", "detector"])
def test_what_began_with_other_weights_is_neither_resumed_nor_reused(nb, tmp_path, kind):
    """The fingerprint is compared where weights are at hand; a detector needs none to be reused."""
    place(
        nb,
        tmp_path,
        **{kind: {**(HALF if kind == "training" else {"recipe": "r"}), "start": "scratch"}},
    )
    done = "resume" if kind == "training" else "reuse"
    assert nb.plan_training("auto", tmp_path, "r", CPU, start="0123456789abcdef") == ("train", None)
    for start in ("scratch", ""):
        assert nb.plan_training("auto", tmp_path, "r", CPU, start=start)[0] == done


def test_weights_are_known_by_their_tensors(nb, vgg_weights, tmp_path):
    """The same tensors from another file, in another format, are the same; others are not."""
    shipped = torch.load(vgg_weights, weights_only=True)
    first = nb.fingerprint(nb.vgg16_features(vgg_weights))
    assert first == nb.fingerprint(dict(reversed(shipped.items())))
    torch.save({key: value.float() for key, value in shipped.items()}, tmp_path / "copy.pth")
    assert first == nb.fingerprint(nb.vgg16_features(tmp_path / "copy.pth"))
    shipped["features.28.bias"][0] += 1
    assert first != nb.fingerprint(shipped)


def test_a_run_from_scratch_resumes_whatever_weights_are_there_now(nb, tiny, tmp_path, monkeypatch):
    """All its weights are in the checkpoint, and as many blocks are trained as before."""
    train, _ = tiny
    monkeypatch.setattr(nb, "PRECISION", "float32")
    monkeypatch.setattr(nb, "DEVICE", CPU)
    scratch = nb.new_run(train.split, None, "from scratch", "r")
    vgg = {f"features.{key}": value for key, value in nb.vgg16_base().state_dict().items()}
    pretrained = nb.new_run(train.split, vgg, "ImageNet features", "r")
    assert (scratch.start, pretrained.start) == ("scratch", nb.fingerprint(vgg))
    assert len(scratch.trained) > len(pretrained.trained)
    for run in (scratch, pretrained):
        run.epoch = 1
        nb.save_run(run, tmp_path)
        again = nb.resumed_run(train.split, nb.load_checkpoint(tmp_path / "last.pth", "training"))
        assert (again.start, again.origin) == (run.start, run.origin)
        for a, b in zip(weights(run), weights(again), strict=True):
            assert torch.equal(a, b)


def test_another_recipe_destroys_nothing(nb, tmp_path, capsys):
    """Its detector and its unfinished run stay under another name, and that run is found again."""
    place(nb, tmp_path, {**HALF, "recipe": "old"}, {"recipe": "old"})
    with pytest.raises(nb.CheckpointError):
        nb.plan_training("reuse", tmp_path, "new", CPU)
    assert not list(tmp_path.glob("other_*"))  # nothing is trained
    assert nb.plan_training("auto", tmp_path, "new", CPU) == ("train", None)
    assert (tmp_path / "best_model.pth").is_file()  # until a better one takes its place
    place(nb, tmp_path, {"recipe": "new", "epoch": 1}, {"recipe": "new"})
    assert nb.load_checkpoint(tmp_path / "other_old_best_model.pth", "detector")["recipe"] == "old"
    assert "other_old_best_model.pth" in capsys.readouterr().out
    nb.plan_training("auto", tmp_path, "new", CPU)  # the same recipe: nothing to do
    assert not list(tmp_path.glob("other_new*"))
    plan, content = nb.plan_training("auto", tmp_path, "old", CPU)
    assert plan == "resume" and content["epoch"] == 3


# --- what makes two trainings the same


@pytest.fixture
def digest_of(nb, drawn_bccd):
    """The digest of a training on the drawn smears, some names of the notebook changed."""
    splits = [nb.SmearSplit(nb.dataset_root(drawn_bccd), part) for part in ("train", "val")]
    return lambda **changed: nb.recipe_digest({**vars(nb), **changed}, splits)


def edited(nb, name, edit):
    """A function or class of the notebook, defined again from its edited source."""
    source = edit(inspect.getsource(getattr(nb, name)))
    file = f"<edited {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace = dict(vars(nb))
    exec(compile(source, file, "exec"), namespace)
    return namespace[name]


def reworded(source):
    """The same code without comments and with other docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            node.body[0].value.value = "Other words."
    return ast.unparse(tree) + "\n# the end\n"


def changed(source):
    """The same code with one statement more in the body of its first function."""
    tree = ast.parse(source)
    next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)).body.append(
        ast.parse("one = 1").body[0]
    )
    return ast.unparse(tree) + "\n"


def configured(nb):
    """The names of the configuration cell's constants."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    return {
        node.targets[0].id for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)
    }


# what a user may change without training again: places, this machine, detection, pictures, counting
FREE = """
BOOTSTRAP_SAMPLES CHECKPOINT_DIR COMPLETE_LABELS COUNT_OVERLAP CPU_MINUTES
DATASET_URL DATA_DIR DATA_NOTE FINETUNE_FROM
IMAGE_MEMORY_MB MAX_OVERLAP MIN_SCORE MY_IMAGES MY_RESULTS MY_XML SAVE_EVERY SHOW_SCORE TOP_K
TRAINING VGG16_WEIGHTS
VOTE_OVERLAP
"""


def test_every_constant_is_part_of_the_recipe_or_known_to_be_free(nb, digest_of):
    """FINETUNE_FROM, COMPLETE_LABELS and VGG16_WEIGHTS count by what is in the files."""
    shaping = configured(nb) - set(FREE.split())
    shaping |= {"VARIANCES", "WORKING_SIZE", "VGG_MEAN", "IMAGE_SIZE", "FEATURE_MAPS"}
    first = digest_of()
    assert len(first) == 16 and first == digest_of()
    same = [name for name in shaping if digest_of(**{name: [getattr(nb, name), "other"]}) == first]
    assert not same
    assert first == digest_of(**{name: "other" for name in FREE.split() if name != "FINETUNE_FROM"})


def test_code_counts_and_wording_does_not(nb, digest_of):
    first = digest_of()
    used = """conv xyxy_to_cxcywh read_image Run training_loop start_from validate augment
    MultiBoxLoss SSD300 encode
    SmearSplit SmearDataset collate train_epoch new_run build_model parse_voc_annotation
    rate_at decay_at""".split()
    for name in used:
        assert first != digest_of(**{name: edited(nb, name, changed)}), name
        assert first == digest_of(**{name: edited(nb, name, reworded)}), name
    for name in (
        "epoch_line",
        "save_run",
        "pick_precision",
        "load_checkpoint",
        "draw_curves",
        "detect",
    ):
        assert first == digest_of(**{name: edited(nb, name, changed)}), name


def test_the_data_count_by_content_and_split(nb, tmp_path, drawn_bccd):
    root = shutil.copytree(drawn_bccd, tmp_path / "copy") / "BCCD"

    def digest(complete=None):
        splits = [nb.SmearSplit(root, part, complete=complete) for part in ("train", "val")]
        return nb.recipe_digest(vars(nb), splits)

    first = digest()
    path = root / "Annotations" / "Smear_00000.xml"
    text = path.read_bytes()
    path.write_bytes(text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))  # as git does on Windows
    assert first == digest()
    path.write_bytes(text.replace(b"<truncated>0", b"<truncated>1", 1))
    assert first != digest()
    path.write_bytes(text)
    cell = {"Smear_00000": (torch.tensor([[1.0, 1, 30, 30]]), torch.tensor([1]))}
    assert first != digest(cell)
    lists = [root / "ImageSets" / "Main" / f"{part}.txt" for part in ("train", "val")]
    train, val = (file.read_text().split() for file in lists)
    lists[0].write_text(
        "\n".join(train[:-1])
    )  # the last training image becomes the first of validation
    lists[1].write_text("\n".join([train[-1], *val]))
    assert first != digest()


def test_a_detector_to_start_from_counts_by_its_weights(nb, digest_of, tmp_path):
    first, path = digest_of(), tmp_path / "first.pth"
    content = {"kind": "detector", "class_names": ["A"], "model": {"w": torch.zeros(2)}}
    torch.save(content, path)
    one = digest_of(FINETUNE_FROM=str(path))
    torch.save({**content, "metrics": {"map": 1}}, tmp_path / "other_name.pth")
    assert one != first and one == digest_of(FINETUNE_FROM=str(tmp_path / "other_name.pth"))
    torch.save({**content, "model": {"w": torch.ones(2)}}, path)
    assert one != digest_of(FINETUNE_FROM=str(path))


# --- the cells


def test_the_cells_of_the_training_can_be_run_again(nb, drawn_bccd, tmp_path, monkeypatch, capsys):
    """Sections 8 to 10 once, then again after the training is done: it reuses what it trained."""
    monkeypatch.delenv("SSD_TRAINING", raising=False)
    monkeypatch.setattr(nb, "VERSIONS", {}, raising=False)
    small = {
        "NUM_EPOCHS": 2,
        "BATCH_SIZE": 2,
        "FROZEN_BLOCKS": 5,
        "PRECISION": "float32",
        "PASSES_PER_EPOCH": 1,
    }
    for name, value in {
        **small,
        "CHECKPOINT_DIR": str(tmp_path),
        "DEVICE": CPU,
        "CPU_MINUTES": 9,
    }.items():
        monkeypatch.setattr(nb, name, value)
    root = nb.dataset_root(drawn_bccd)
    space = vars(nb)
    before = set(space)
    nb.train_set, nb.val_set = (
        part_of(nb.SmearSplit(root, part), range(2)) for part in ("train", "val")
    )
    nb.train_data, nb.vgg_weights = nb.SmearDataset(nb.train_set, nb.WORKING_SIZE), None
    monkeypatch.setattr(nb, "weights_for_training", lambda folder: (None, "random numbers"))
    nb.complete_labels = {}
    try:
        cells = [
            cell for cell in training_cells() if not set(cell.metadata.get("tags", ())) & {"define"}
        ]
        for _ in range(2):
            for cell in cells:
                exec(compile(cell.source, "<a cell>", "exec"), space)
    finally:
        for name in set(space) - before:
            del space[name]
    said = capsys.readouterr().out
    assert said.count("from the start") == 1 and said.count("reusing") == 1
    assert said.count("epoch  2/2") == 2 and said.count("Lowest validation loss") == 2
    assert (tmp_path / "best_model.pth").is_file()


def training_cells():
    """The code cells of section 10."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    at = [i for i, cell in enumerate(cells) if cell.source.startswith(("## 10. ", "## 11. "))]
    return [cell for cell in cells[at[0] : at[1]] if cell.cell_type == "code"]


def syntax(nb, source):
    """What counts of some code, as text."""
    return json.dumps(ast.parse(source), default=nb.plain_syntax)


def test_plain_syntax_ignores_comments_docstrings_and_messages_only(nb):
    plain = syntax(nb, 'def f(a):\n    """Says this."""\n    # and that\n    return a + 1  # one\n')
    other = syntax(
        nb, 'def f(a):\n    """Says something\n    else."""\n\n    return (a +\n        1)\n'
    )
    assert plain == other
    assert plain != syntax(nb, 'def f(a):\n    """Says this."""\n    return a + 2\n')
    assert syntax(nb, 'x = "# no comment"\n') != syntax(nb, 'x = "# no"\n')
    assert syntax(nb, "x = b'one'\n") != syntax(nb, "x = b'two'\n")
    assert syntax(nb, 'print("one")') == syntax(nb, 'print("two", 3)') != syntax(nb, "show(3)")
    assert syntax(nb, 'raise E("one")') == syntax(nb, 'raise E("two") from None')


def test_the_digest_does_not_depend_on_how_a_python_writes_code_back(nb):
    """Some versions unparse a lone generator with brackets of its own; other code is other code."""
    assert syntax(nb, "tuple((x for x in y))") == syntax(nb, "tuple(x for x in y)")
    assert syntax(nb, "tuple(x for x in y)") != syntax(nb, "tuple(x for x in z)")
    later = ast.parse(
        "def f(a): return a"
    )  # as Python 3.12 parses it: with a list of type parameters
    earlier = ast.parse("def f(a): return a")
    later.body[0].type_params, earlier.body[0].type_params = [], None
    later, earlier = (json.dumps(tree, default=nb.plain_syntax) for tree in (later, earlier))
    assert later == earlier


def test_a_docstring_may_come_and_a_class_counts_whole(nb, digest_of):
    """Also what is no method: attributes and bases."""
    first = digest_of()
    assert 'def collate(items):\n    """' in inspect.getsource(nb.collate)
    bare = edited(nb, "collate", lambda source: ast.unparse(without_docstring(source)) + "\n")
    assert bare.__doc__ is None and first == digest_of(collate=bare)
    more = edited(nb, "SmearSplit", lambda source: source + "\n    an_attribute = 1\n")
    assert first != digest_of(SmearSplit=more)


def without_docstring(source):
    """The tree of a function without its docstring."""
    tree = ast.parse(source)
    del tree.body[0].body[0]
    return tree
