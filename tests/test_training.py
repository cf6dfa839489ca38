"""Training: schedule, steps that add up, exact resume, a small run that learns."""

import math

import nbformat
import pytest
import torch
from conftest import NOTEBOOK, part_of

CPU = torch.device("cpu")


@pytest.fixture
def tiny(nb, monkeypatch, drawn_bccd):
    """Settings for a run of seconds; three drawn training smears and two validation smears."""
    settings = {
        "BATCH_SIZE": 2,
        "SAVE_EVERY": 2,
        "WARMUP_EPOCHS": 0.5,
        "LEARNING_RATE": 1e-3,
        "PASSES_PER_EPOCH": 1,
        "PRECISION": "float32",
        "DEVICE": CPU,
    }
    for name, value in settings.items():
        monkeypatch.setattr(nb, name, value)
    for name in ("SSD_BATCH_DIVISOR", "SSD_RUN_ID", "SSD_TRAINING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nb, "VERSIONS", {}, raising=False)
    root = nb.dataset_root(drawn_bccd)
    train = part_of(nb.SmearSplit(root, "train"), range(3))
    val = part_of(nb.SmearSplit(root, "val"), range(2))
    return nb.EveryCellDataset(train, nb.WORKING_SIZE), nb.EveryCellDataset(val, 300)


def small_run(nb, train, epochs=2):
    """A run from random numbers, as many blocks frozen as with ImageNet's features."""
    images, _, _ = nb.SmearDataset(train.split, 300).batch([0])
    model = nb.build_model(4, None, nb.normalize(images), seed=0)
    nb.freeze_blocks(model, nb.FROZEN_BLOCKS)
    facts = {"recipe": "r", "origin": "features", "start": "features", "run_id": ""}
    return nb.Run(model, epochs, torch.float32, CPU, facts)


def weights(run):
    """Copies of all weights of a run, trained and averaged."""
    copies = [weight.detach().clone() for weight in run.model.parameters()]
    return copies + [weight.detach().clone() for weight in run.averaged.parameters()]


def whole_batch(train):
    """The first two images of a dataset as a step takes them, with `complete`."""
    images, boxes, labels = type(train)(train.split, 300, train.labels_by_id).batch([0, 1])
    return images.float(), boxes, labels, train.complete[:2]


def test_the_learning_rate_warms_up_and_falls_to_zero(nb, monkeypatch):
    monkeypatch.setattr(nb, "LEARNING_RATE", 0.1)
    monkeypatch.setattr(nb, "WARMUP_EPOCHS", 1.0)
    rates = [nb.rate_at(i / 10, 5) for i in range(51)]
    assert rates[0] < 0.02 and rates[10] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[30] == pytest.approx(0.05)  # half way down the cosine
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert all(math.isfinite(nb.rate_at(i / 10, 1)) for i in range(11))


def test_biases_learn_twice_as_fast_and_do_not_decay(nb):
    model = nb.SSD300(4)
    optimizer = nb.make_optimizer(model)
    nb.set_rate(optimizer, 0.25)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen += 1
            name = names[id(parameter)]
            is_bias = name.endswith("bias") or name == "scale"
            assert group["factor"] == (2 if is_bias else 1)
            assert group["weight_decay"] == (0 if is_bias else nb.WEIGHT_DECAY)
            assert group["lr"] == 0.25 * group["factor"]
    assert seen == len(names)


def test_the_average_follows_the_weights(nb):
    """Step 1 keeps 18% of the average; what is frozen stays as it is, bit for bit."""
    model, averaged = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = averaged.weight.detach().clone()
    averaged.bias.data.copy_(model.bias.data)
    nb.update_average(averaged, model, nb.decay_at(1))
    wanted = 2 / 11 * before + 9 / 11 * model.weight
    assert torch.allclose(averaged.weight, wanted, atol=1e-6)
    assert torch.equal(averaged.bias, model.bias)


def test_parts_of_a_batch_take_the_same_step(nb, tiny):
    """A batch in halves moves the weights as the whole batch does."""
    train, _ = tiny
    ends = []
    for step, parts in ((nb.training_step, 1), (nb.step_in_parts, 2)):
        run = small_run(nb, train)
        run.parts = parts
        nb.set_rate(run.optimizer, 1e-3)
        terms = step(run, *whole_batch(train))
        ends.append((terms, weights(run)))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-4)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)


def test_validation_measures_the_averaged_weights_and_leaves_the_trained_ones(nb, tiny):
    """The loss is that of a twin holding the averages in half precision; the run stays as is."""
    train, val = tiny
    run = small_run(nb, train)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for average in run.averaged.parameters():
            average += 0.01 * average.abs().mean() * torch.randn(average.shape, generator=g)
    before = weights(run)
    got = nb.validate(run, val)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))

    twin = nb.SSD300(4)
    with torch.no_grad():
        pairs = zip(twin.parameters(), run.averaged.parameters(), strict=True)
        for parameter, average in pairs:
            parameter.copy_(average.half())
        images, boxes, labels = val.batch([0, 1])
        loss = nb.MultiBoxLoss(twin.priors)(*twin(nb.normalize(images)), boxes, labels)
    assert got == pytest.approx([loss["localization"].item(), loss["confidence"].item()], rel=1e-4)
    state = nb.averaged_state(run)
    assert state.keys() == run.model.state_dict().keys()
    assert all(torch.equal(state[key].float(), value) for key, value in twin.state_dict().items())


def test_validation_of_several_batches_counts_each_positive_once(nb, tiny, monkeypatch):
    train, val = tiny
    model = small_run(nb, train).model
    together = nb.validation_loss(model, val, torch.float32)
    monkeypatch.setattr(nb, "BATCH_SIZE", 1)
    assert nb.validation_loss(model, val, torch.float32) == pytest.approx(together, rel=1e-4)
    first = nb.validation_loss(model, val, torch.float32, [0])
    assert first != pytest.approx(together, rel=1e-4)


def test_an_epoch_passes_over_the_images_as_often_as_asked(nb, tiny, monkeypatch):
    """Every image once a pass, each pass in another order; the rate falls over the epochs."""
    train, _ = tiny
    order = nb.epoch_order(5, 3, torch.Generator().manual_seed(1))
    passes = order.view(3, 5)
    assert all(sorted(one.tolist()) == list(range(5)) for one in passes)
    assert passes.unique(dim=0).shape[0] > 1
    part = nb.epoch_order(4, 1.5, torch.Generator().manual_seed(1)).tolist()
    assert len(part) == 6 and set(part) == {0, 1, 2, 3} and max(map(part.count, part)) == 2
    run, rates = small_run(nb, train), []
    run.passes = 3

    def rate_at(progress, epochs):
        rates.append((progress, epochs))
        return 0.0

    monkeypatch.setattr(nb, "step_in_memory", lambda run, *batch: torch.ones(2))
    monkeypatch.setattr(nb, "rate_at", rate_at)
    terms, _ = nb.train_epoch(run, train)
    # 3 images, 3 passes, batches of 2
    assert run.steps == 5 and run.epoch == 1 and terms == [1.0, 1.0]
    assert rates == [(i / 5, 2) for i in range(5)]


def test_skipped_cells_are_learned_and_the_loss_is_told_which_images_are_complete(
    nb, tiny, monkeypatch, tmp_path
):
    """With complete labels: twice the outputs, in the file too, and flags for the loss."""
    train, _ = tiny
    boxes, labels = train.split.boxes[1], train.split.labels[1]
    extra = torch.tensor([[1.0, 1, 30, 30]])
    every_cell = (torch.cat([boxes, extra]), torch.cat([labels, torch.tensor([1])]))
    more = nb.EveryCellDataset(train.split, nb.WORKING_SIZE, {train.split.ids[1]: every_cell})
    assert more.complete.tolist() == [False, True, False] and more.count_skipped() == 1
    told = []
    real = nb.PartialLabelLoss.sums

    def sums(self, locs, scores, boxes, labels, complete):
        told.append((scores.shape[-1], complete.tolist()))
        return real(self, locs, scores, boxes, labels, complete)

    monkeypatch.setattr(nb.PartialLabelLoss, "sums", sums)
    for data, outputs, flags in ((train, 4, [False, False]), (more, 7, [False, True])):
        run = nb.new_run(data, recipe="r", origin="random numbers")
        assert run.model.num_classes == outputs
        told.clear()
        nb.training_step(run, *whole_batch(data))
        val = nb.EveryCellDataset(part_of(data.split, range(2)), 300, data.labels_by_id)
        nb.validate(run, val)
        assert told == [(outputs, flags)] * 2
        run.history = [{"seconds": 1.0, "memory_gb": 1.0}]
        path = tmp_path / f"{outputs}.pth"
        nb.save_atomically(nb.detector_content(run, nb.averaged_state(run), 1), path)
        assert nb.load_checkpoint(path, "detector")["skipped"] == (outputs == 7)
        assert nb.load_detector(path)[0].num_classes == outputs


def test_out_of_memory_halves_the_parts_of_a_batch_and_goes_on(nb, tiny, monkeypatch, capsys):
    train, _ = tiny
    run = small_run(nb, train)

    def short_of_memory(run, *batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nb, "training_step", short_of_memory)
    terms = nb.step_in_memory(run, *whole_batch(train))
    assert run.parts == 2 and torch.isfinite(terms).all()
    assert "memory" in capsys.readouterr().out.lower()

    def broken(run, *batch):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(nb, "step_in_parts", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        nb.step_in_memory(run, *whole_batch(train))


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_killed(nb, tiny, tmp_path, capsys):
    train, val = tiny
    whole = small_run(nb, train)
    nb.training_loop(whole, train, val, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "1 more epoch take" in said and "NUM_EPOCHS" in said and "stop at any time" in said

    killed = small_run(nb, train)

    class Killed(Exception):
        pass

    state_of_chance = []

    def kill(history):
        if len(history) == 1:
            state_of_chance.append(torch.get_rng_state())
            raise Killed

    with pytest.raises(Killed):
        nb.training_loop(killed, train, val, tmp_path / "killed", kill)
    torch.manual_seed(12345)  # another process, another state of chance
    content = nb.load_checkpoint(tmp_path / "killed" / "last.pth", "training")
    resumed = nb.resumed_run(train, content)
    assert resumed.epoch == 1 and torch.equal(torch.get_rng_state(), state_of_chance[0])
    nb.training_loop(resumed, train, val, tmp_path / "killed")

    assert resumed.steps == whole.steps == 4
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)
    for one, two in zip(whole.history, resumed.history, strict=True):
        same = [key for key in one if key not in ("seconds", "memory_gb")]
        assert all(one[key] == two[key] for key in same) and one.keys() == two.keys()
    assert (tmp_path / "whole" / "ssd300_epoch_2.pth").is_file()
    _, names = nb.load_detector(tmp_path / "whole" / "ssd300_epoch_2.pth")
    assert names == nb.CLASS_NAMES


def test_it_learns_and_keeps_the_epoch_with_the_lowest_validation_loss(
    nb, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(nb, "NUM_EPOCHS", 3)
    train, val = tiny
    run = small_run(nb, train, epochs=3)
    seen = []
    nb.training_loop(run, train, val, tmp_path, lambda history: seen.append(len(history)))
    assert seen == [1, 2, 3]
    losses = [nb.total_loss(row, "val") for row in run.history]
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
    images, boxes, labels = val.batch([0, 1])
    criterion = nb.MultiBoxLoss(nb.create_prior_boxes(), 0.5, 3)
    with torch.no_grad():
        loss = criterion(*model(nb.normalize(images)), boxes, labels)
    assert sum(value.item() for value in loss.values()) == pytest.approx(run.best["loss"], rel=1e-4)


def test_a_loss_that_is_not_a_number_stops_with_a_sentence(nb, tiny, tmp_path, monkeypatch):
    train, val = tiny
    run = small_run(nb, train)
    monkeypatch.setattr(nb, "train_epoch", lambda run, dataset: ([math.nan, 1.0], 1e-3))
    with pytest.raises(nb.StudyError, match="LEARNING_RATE"):
        nb.training_loop(run, train, val, tmp_path)
    assert not (tmp_path / "last.pth").exists()


def test_a_run_from_scratch_resumes_whatever_weights_are_there_now(nb, tiny, tmp_path):
    """All its weights are in the checkpoint, and as many blocks are trained as before."""
    train, _ = tiny
    scratch = nb.new_run(train, None, "random numbers", "r")
    vgg = {f"features.{key}": value for key, value in nb.vgg16_base().state_dict().items()}
    pretrained = nb.new_run(train, vgg, "ImageNet features", "r")
    assert scratch.facts["start"] == "scratch"
    assert pretrained.facts["start"] == nb.fingerprint(vgg)
    assert len(scratch.trained) > len(pretrained.trained)
    for run in (scratch, pretrained):
        run.epoch = 1
        nb.save_run(run, tmp_path)
        content = nb.load_checkpoint(tmp_path / "last.pth", "training")
        again = nb.resumed_run(train, content)
        assert again.facts == run.facts and len(again.trained) == len(run.trained)
        for a, b in zip(weights(run), weights(again), strict=True):
            assert torch.equal(a, b)


def test_the_checkpoints_folder_keeps_large_files_out_of_git(nb, tmp_path):
    nb.make_folder(tmp_path / "checkpoints")
    ignored = (tmp_path / "checkpoints" / ".gitignore").read_text().splitlines()
    assert "*" in ignored and "!best_model.pth" in ignored and "!metrics.json" in ignored
    (tmp_path / "checkpoints" / ".gitignore").write_text("mine")
    nb.make_folder(tmp_path / "checkpoints")  # what is there is left alone
    assert (tmp_path / "checkpoints" / ".gitignore").read_text() == "mine"


def training_cells():
    """The code cells of section 10 from the plan on."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    sources = [cell.source for cell in cells]
    first = [i for i, source in enumerate(sources) if source.startswith("### Train")][0]
    last = [i for i, source in enumerate(sources) if source.startswith("## 11. ")][0]
    return [cell for cell in cells[first:last] if cell.cell_type == "code"]


def test_the_cells_of_the_training_can_be_run_again(nb, tiny, tmp_path, monkeypatch, capsys):
    """Stopped after an epoch, then the last cell alone again, then all: nothing is trained twice."""
    train, val = tiny
    settings = {"NUM_EPOCHS": 2, "FROZEN_BLOCKS": 5, "CHECKPOINT_DIR": str(tmp_path)}
    for name, value in settings.items():
        monkeypatch.setattr(nb, name, value)
    monkeypatch.setattr(nb, "weights_for_training", lambda folder: (None, "random numbers"))
    monkeypatch.setattr(nb, "what_is_missing", lambda *about: [])
    space = dict(vars(nb))
    space.update({"train_set": train.split, "val_set": val.split, "vgg_weights": None})
    space.update({"train_data": train, "val_data": val, "labels_by_id": {}})
    shared = vars(nb)
    before = set(shared)
    shared.update(space)
    cells = [compile(cell.source, "<a cell>", "exec") for cell in training_cells()]
    save_run = nb.save_run

    def stop_after_the_first_epoch(run, folder):
        save_run(run, folder)
        raise KeyboardInterrupt

    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(nb, "save_run", stop_after_the_first_epoch)
            for cell in cells:
                exec(cell, shared)
        exec(cells[-1], shared)
        for cell in cells:
            exec(cell, shared)
    finally:
        for name in set(shared) - before:
            del shared[name]
    said = capsys.readouterr().out
    assert said.count("from the start") == 1 and said.count("resumed after epoch 1") == 1
    assert said.count("reusing") == 1
    assert said.count("epoch  2/2") == 2 and said.count("Lowest validation loss") == 2
    assert (tmp_path / "best_model.pth").is_file()
