"""Settings as files: what is written comes back the same, and what cannot be meant is refused in one line that names the field."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wherefrom.pipeline.laws import Center, Disjoint, Grid, Independent, Overlapping, Paired
from wherefrom.pipeline.view_recipe import LAWS, ColorLaw, ViewFamily
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives.spatial import SpatialSettings
from wherefrom.train.objectives.spatial_dense import DenseSpatialSettings
from wherefrom.train.plain_data import differences, from_plain, to_plain, unchecked
from wherefrom.train.recipes import RECIPES, recipe
from wherefrom.train.renames import RENAMED
from wherefrom.train.settings import (
    IndexSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
    check_same_run,
    read_settings,
    settled,
    write_settings,
)

pytestmark = pytest.mark.core

DEMO_SP = recipe("demo").objectives["spatial"]
OBJECTIVES = {
    "spatial": st.builds(
        SpatialSettings, color=st.none() | st.builds(ColorLaw, hue=st.floats(0, 0.5)), turns=st.booleans(), weight=st.floats(0, 9)
    ),
    "dense": st.builds(DenseSpatialSettings, regions=st.integers(2, 40)),
}
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**64 - 1),
        "updates": st.none() | st.integers(1, 10**9),
        "data": st.none() | st.text(min_size=1),
        "order": st.sampled_from(["shuffled", "block"]),
        "optim": st.builds(
            OptimSettings, lr=st.floats(1e-12, 1e3), clip_norm=st.none() | st.floats(1e-6, 1e6), weight_decay=st.floats(0, 1)
        ),
        "objectives": st.permutations(["spatial", "dense"])
        .flatmap(lambda names: st.sampled_from([names, names[:1]]))
        .flatmap(lambda names: st.fixed_dictionaries({name: OBJECTIVES[name] for name in names})),
        "model": st.builds(ModelSettings, depth=st.none() | st.integers(1, 12), summary=st.sampled_from(["auto", "mean"])),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(RECIPES)), changes=CHANGES)
def test_what_is_written_comes_back_the_same(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    changed = dataclasses.replace(recipe(name), **changes)
    path = tmp_path / "settings.yaml"
    write_settings(path, changed)
    # the start has other values everywhere, none of which may show through
    for start in (recipe("demo"), recipe("imagenet_sp_vits16")):
        read = read_settings(path, start)
        assert read == changed and list(read.objectives) == list(changed.objectives)
    assert from_plain(recipe("demo"), json.loads(json.dumps(to_plain(changed)))) == changed


def test_a_file_of_some_settings_leaves_the_others_alone(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("global_batch: 32\noptim:\n  lr: 1e-3\nspatial: {color: {hue: 0.2}}\n")
    base = recipe("demo")
    read = read_settings(path, base)
    assert (read.global_batch, read.optim.lr, read.objectives["spatial"].color) == (32, 1e-3, ColorLaw(hue=0.2))
    assert {where for where, _, _ in differences(to_plain(read), to_plain(base))} == {
        "global_batch",
        "optim.lr",
        "objectives.spatial.color",
    }


@pytest.mark.parametrize("law", [Paired(position_max=1.2), Center()])
def test_a_field_that_holds_one_of_a_table_says_which(law: Paired | Center) -> None:
    family = ViewFamily(name="views", views=2, size_px=(96, 64), law=law)
    plain = to_plain(family)
    assert LAWS[plain["law"]["name"]] is type(law)
    assert from_plain(ViewFamily(name="other", views=1, size_px=(1, 1)), plain) == family
    assert to_plain(unchecked(family)) == plain


def test_a_law_keeps_its_numbers_until_another_one_is_named() -> None:
    base = recipe("demo")
    for plain, law in (
        ({"min_gap_frac": 0.1}, dataclasses.replace(base.objectives["spatial"].law, min_gap_frac=0.1)),
        ({"name": "disjoint", "min_gap_frac": 0.1}, dataclasses.replace(base.objectives["spatial"].law, min_gap_frac=0.1)),
        ({"name": "independent"}, Independent()),
        ({"name": "grid", "cols": 2}, Grid(cols=2)),
        ({"name": "overlapping", "of": "spatial"}, Overlapping(of="spatial")),
    ):
        for start in (base, unchecked(base)):
            read = settled(from_plain(start, {"objectives": {"spatial": {"law": plain}}}))
            assert read.objectives["spatial"].law == law


BROKEN = {
    "optim: {lrr: 1.0}": r"optim\.lrr: no such setting; did you mean optim\.lr\?",
    "sed: 1": r"sed: no such setting; did you mean seed\?",
    "zzzz: 1": "zzzz: no such setting; there are recipe, ",
    "optim: {lr: fast}": "optim.lr='fast': needs a number",
    "optim: {lr: true}": "optim.lr=True: needs a number",
    "optim: {lr: -1}": "optim: lr=-1.0, final_lr=0.0: needs lr > 0",
    "optim: {lr: .inf}": "optim: lr=inf, final_lr=0.0: needs lr > 0, finite",
    "spatial: {temperature: 0}": "spatial: temperature=0.0: needs a positive number, or none",
    "spatial: {hidden: 0}": "spatial: hidden=0: needs at least 1, or none",
    "dense: {hidden: 0}": "dense: hidden=0: needs at least 1, or none",
    "optim: {betas: [0.9]}": r"optim\.betas=\[0\.9\]: needs 2 values",
    "optim: {betas: [0.9, x]}": r"optim\.betas\[1\]='x': needs a number",
    "optim: 3": "optim=3: needs named fields",
    "seed: 1.5": "seed=1.5: needs a whole number",
    "seed: -1": r"seed=-1: needs 0 <= seed < 2\*\*64",
    "precision: float8": "precision='float8': needs one of float32, bfloat16",
    "seed: null": "seed=None: needs a whole number",
    "spatial: {turns: 1}": "spatial.turns=1: needs true or false",
    "spatial: {color: {hue: 0.7}}": "spatial.color: hue=0.7: needs 0 to 0.5",
    "spatial: {law: {name: pared}}": r"spatial\.law: no law 'pared'; did you mean 'paired'\?",
    "spatial: {law: {name: paired, area_frac: [0.1, 0.2]}}": r"spatial\.law\.area_frac: no such setting of the paired law; did you mean",
    "spatial: {law: {aspects: [1, 1]}}": r"spatial\.law\.aspects: no such setting of the disjoint law; did you mean spatial\.law\.aspect\?",
    "spatial: {law: {name: paired}, views: 4}": "spatial: views=4 of family 'spatial': the paired law draws 2; take views=2",
    "spatial: {law: {name: inside, of: spatial}}": "spatial: family 'spatial' refers to 'spatial', which must come before it",
    "spatial: {law: {name: inside}}": r"spatial\.law\.of=None: has no default, give a value",
    "spatial: {law: {name: 3}}": r"spatial\.law\.name=3: needs a word",
    "spatial: {law: [paired]}": r"spatial\.law=\['paired'\]: needs a law, e\.g\. {name: independent}",
    "objectives: {sp: {}}": "sp: no objective 'sp'; there are spatial, dense",
    "objectives: {spatial: null}": "spatial=None: needs named fields, {} for none",
    "objectives: [spatial]": r"objectives=\['spatial'\]: needs named fields",
    "objectives: {}": "objectives: there is nothing to learn; name one of spatial, dense",
    "spatial: null": "objectives: there is nothing to learn; name one of spatial, dense",
    "{objectives: {dense: {}}, dense: {regions: 3}}": "dense: stands in objectives, too; leave one of them out",
    "dense: {weight: -1}": r"dense: weight=-1\.0, weight_position=1\.0, weight_scale=1\.0: weights cannot be negative",
    "foreign_objectives: {}": "foreign_objectives: no such setting; did you mean objectives",
    "model: {name: vit_tiny_patchx}": "model: model 'vit_tiny_patchx'",
    "val: shards.tar": "val='shards.tar' without data",
    "[1, 2]": "holds list, expected named settings",
    "a: [": "no settings file",
    "!!python/object/apply:os.getcwd []": "no settings file",
}


@pytest.mark.parametrize(("text", "message"), BROKEN.items())
def test_a_broken_file_is_refused_in_one_line_that_names_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        read_settings(path, recipe("demo"))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (RuntimeSettings, "renderer", "natvie"),
        (RuntimeSettings, "device", "gpu"),
        (RuntimeSettings, "compile", 1),
        (RuntimeSettings, "threads", 2.0),
        (OptimSettings, "schedule", "cosin"),
        (TrainSettings, "order", "shufled"),
        (TrainSettings, "precision", "bf16"),
        (TrainSettings, "seed", True),
        (ModelSettings, "summary", "cls"),
        (SpatialSettings, "law", "disjoint"),
        (SpatialSettings, "mirror", "both"),
        (SpatialSettings, "mirror", True),
        (SpatialSettings, "turns", "yes"),
        (SpatialSettings, "views", 2.0),
        (SpatialSettings, "position", "referenced"),
        (SpatialSettings, "scale", "area"),
        (SpatialSettings, "axes", "veiw"),
        (SpatialSettings, "head", "atend"),
        (SpatialSettings, "loss", "l2"),
        (SpatialSettings, "stop", "target"),
        (DenseSpatialSettings, "pairs", "appart"),
        (DenseSpatialSettings, "sampling", "adaptve"),
        (DenseSpatialSettings, "mirror", "veiw"),
    ],
)
def test_what_is_misspelled_in_python_is_refused_where_it_is_set(kind: type, name: str, value: object) -> None:
    given = {"recipe": "mine"} if kind is TrainSettings else {}
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: (take|needs) ") as refused:
        kind(**given, **{name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_stage_on_the_way_holds_the_same_and_is_checked_once_it_is_settled(name: str) -> None:
    base = recipe(name)
    stage = unchecked(base)
    assert to_plain(stage) == to_plain(base)
    assert settled(stage) == base
    broken = dataclasses.replace(stage, val="val.tar", optim=dataclasses.replace(stage.optim, lr=-1.0))
    with pytest.raises(ValueError, match=r"optim: lr=-1\.0"):
        settled(broken)
    mended = dataclasses.replace(broken, data="train.tar", optim=dataclasses.replace(broken.optim, lr=1.0))
    assert settled(mended) == dataclasses.replace(base, data="train.tar", val="val.tar", optim=dataclasses.replace(base.optim, lr=1.0))


@pytest.mark.parametrize(
    ("start", "text", "expected"),
    [
        ("demo", "{name: vit_base_patch16_224}", {"view_size_px": 48}),
        ("demo", "{name: vit_base_patch16_224, depth: 3}", {"view_size_px": 48, "depth": 3}),
        ("demo", "{name: vit_base_patch16_224, view_size_px: null}", {}),
        ("demo", "{name: resnet18}", {}),
        ("sp_dense", "{name: deit_tiny_patch16_224}", {"view_size_px": 96}),
        ("imagenet_sp_vits16", "{name: resnet50}", {"drop_path": 0.1}),  # no shape of the old model
        ("demo", "{depth: 3}", {"view_size_px": 48, "patch_size_px": 12, "width": 128, "depth": 3, "heads": 4}),
    ],
)
def test_another_model_is_itself_and_keeps_nothing_of_the_old_ones_shape(
    tmp_path: Path, start: str, text: str, expected: dict[str, Any]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"model: {text}\n")
    base = recipe(start)
    read = read_settings(path, base)
    assert read.model == ModelSettings(name=yaml.safe_load(text).get("name", base.model.name), **expected)
    assert dataclasses.replace(read, model=base.model) == base


def test_only_runtime_and_places_may_differ_from_the_run_to_go_on_with() -> None:
    run = recipe("demo")
    saved = yaml.safe_load(yaml.safe_dump(to_plain(run)))
    check_same_run(dataclasses.replace(run, data="elsewhere.tar", runtime=dataclasses.replace(run.runtime, log_every=3, prefetch=7)), saved)
    check_same_run(dataclasses.replace(run, index=IndexSettings(decode="never")), saved)
    for changes, where in (
        (
            {"objectives": {**run.objectives, "dense": DenseSpatialSettings()}},
            r"objectives=\['spatial', 'dense'\]: the run .* \['spatial'\]",
        ),
        (
            {"objectives": {"spatial": dataclasses.replace(run.objectives["spatial"], weight=0.5)}},
            r"spatial\.weight=0\.5: the run .* has 1\.0",
        ),
        ({"seed": 1}, "seed=1"),
        ({"optim": dataclasses.replace(run.optim, lr=1.0)}, "optim.lr=1.0"),
        ({"model": dataclasses.replace(run.model, depth=5)}, "model.depth=5"),
        ({"updates": 7}, "updates=7"),
    ):
        with pytest.raises(ValueError, match=where):
            check_same_run(dataclasses.replace(run, **changes), saved)


def test_which_objective_is_the_host_belongs_to_a_run() -> None:
    both = {"dense": DenseSpatialSettings(), "spatial": SpatialSettings()}
    run = dataclasses.replace(recipe("demo"), objectives=both)
    saved = yaml.safe_load(yaml.safe_dump(to_plain(run), sort_keys=False))
    check_same_run(run, saved)
    with pytest.raises(ValueError, match=r"objectives=\['spatial', 'dense'\]: the run to go on with has \['dense', 'spatial'\]"):
        check_same_run(dataclasses.replace(run, objectives=dict(reversed(both.items()))), saved)


def test_a_model_with_batch_norm_goes_on_with_its_micro_batches_alone() -> None:
    run = dataclasses.replace(recipe("imagenette_sp"), model=ModelSettings(name="resnet10t"))
    parted = dataclasses.replace(run, runtime=dataclasses.replace(run.runtime, accumulation=2))
    refusal = "runtime.accumulation=2: the run to go on with has 1, and in 'resnet10t' the samples of a micro-batch see one another; "
    with pytest.raises(ValueError, match=f"^{re.escape(refusal)}"):
        check_same_run(parted, to_plain(run))
    vit = dataclasses.replace(parted, model=recipe("imagenette_sp").model)
    check_same_run(vit, to_plain(dataclasses.replace(vit, runtime=run.runtime)))


def test_a_file_lists_what_is_learned_or_changes_and_adds_by_name(tmp_path: Path) -> None:
    path, base = tmp_path / "some.yaml", recipe("demo")
    sp = base.objectives["spatial"]
    for text, expected in (
        ("spatial: {views: 3}", {"spatial": dataclasses.replace(sp, views=3)}),
        ("dense: {regions: 3}", {"spatial": sp, "dense": DenseSpatialSettings(regions=3)}),
        ("{spatial: null, dense: {}}", {"dense": DenseSpatialSettings()}),
        ("objectives: {dense: {weight: 2}, spatial: {}}", {"dense": DenseSpatialSettings(weight=2.0), "spatial": sp}),
        ("objectives: {dense: {}}", {"dense": DenseSpatialSettings()}),
        ("{objectives: {dense: {}}, spatial: {}}", {"dense": DenseSpatialSettings(), "spatial": sp}),
    ):
        path.write_text(text)
        read = read_settings(path, base).objectives
        assert list(read.items()) == list(expected.items()), text


def test_a_plug_in_weighs_a_tenth_and_objectives_are_made_in_order_with_their_weights() -> None:
    run = recipe("demo").with_objectives(dense=DenseSpatialSettings())
    host, plugin = run.make_objectives()
    assert (host.name, host.weight, plugin.name, plugin.weight) == ("spatial", 1.0, "dense", 0.1)
    assert run.with_objectives(dense=None) == recipe("demo")


def test_every_recipe_is_complete_and_known_by_its_name() -> None:
    for name in RECIPES:
        settled = recipe(name)
        assert isinstance(settled, TrainSettings)
        assert settled.recipe == name
    with pytest.raises(ValueError, match="did you mean 'imagenette_sp'"):
        recipe("imagenete_sp")


def test_the_learning_rate_peaks_at_lr_after_the_warm_up() -> None:
    run = recipe("imagenet_sp_vits16")
    rates = [run.learning_rate(update, 1000) for update in range(1000)]
    assert max(rates) == run.optim.lr
    assert rates.index(max(rates)) == int(run.optim.warmup_frac * 1000)
    assert rates[-1] == pytest.approx(run.optim.final_lr, abs=1e-12)


OF_0_1 = Path(__file__).parent / "data" / "settings_0_1"  # as 0.1.0 wrote it: of every recipe, and other choices


@pytest.mark.parametrize("name", ["demo", "sp_dense", "imagenette_sp", "imagenet_sp_vits16", "imagenet_sp_dense_vits16"])
def test_settings_of_0_1_0_are_those_of_the_same_run(name: str) -> None:
    run = recipe(name)
    for start in (run, recipe("demo"), recipe("sp_dense")):
        read = read_settings(OF_0_1 / f"{name}.yaml", start)
        assert read == dataclasses.replace(
            run, runtime=dataclasses.replace(run.runtime, renderer="native")
        )  # a run writes down what served


def test_every_choice_of_0_1_0_is_read_under_its_name_of_today() -> None:
    read = read_settings(OF_0_1 / "other_choices.yaml", recipe("imagenet_sp_vits16"))
    color = ColorLaw(hue=0.05, gray_prob=0.1, blur_prob=0.3, solarize_prob=0.2)
    tenths = {"weight": 1.0, "weight_position": 0.1, "weight_scale": 0.1}  # as they were by default
    assert list(read.objectives) == ["spatial", "dense"]
    assert read.objectives["spatial"] == SpatialSettings(
        **tenths,
        law=Independent(area_frac=(0.1, 0.5)),
        views=3,
        turns=True,
        color=color,
        equalize_px=48,
        standardize=False,
        head="additive",
        loss="smooth_l1",
    )
    assert read.objectives["dense"] == DenseSpatialSettings(**tenths, size_px=96)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (
            "{law: disjoint, area_frac: [0.1, 0.2]}",
            {"law": Disjoint(area_frac=(0.1, 0.2), aspect=DEMO_SP.law.aspect)},
        ),
        ("{min_gap_frac: 0.1}", {"law": dataclasses.replace(DEMO_SP.law, min_gap_frac=0.1)}),
        ("{law: paired, position_max: 1.2}", {"law": Paired(position_max=1.2, border_frac=0.02)}),
        ("{law: paired, views: 6, border_frac: 0.1, aspect: [1, 1]}", {"law": Paired(border_frac=0.1)}),
        ("{law: paired}", {"law": Paired(border_frac=0.02)}),
        ("{law: independent}", {"law": Independent(area_frac=(0.05, 0.12))}),
        ("{law: {name: independent}}", {"law": Independent()}),
        ("{colour: {grey_prob: 0.5}, standardise: false}", {"color": ColorLaw(gray_prob=0.5), "standardize": False}),
        ("{color: {gray_prob: 0.5}}", {"color": ColorLaw(gray_prob=0.5)}),
    ],
)
def test_a_file_written_by_hand_for_0_1_0_is_read_alike(tmp_path: Path, text: str, changes: dict[str, Any]) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(f"spatial: {text}\n")
    base = recipe("demo")
    assert read_settings(path, base).objectives["spatial"] == dataclasses.replace(base.objectives["spatial"], **changes)


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("{standardise: false, standardize: true}", "spatial.standardise", "spatial.standardize"),
        ("{color: null, colour: {grey_prob: 0.5}}", "spatial.colour", "spatial.color"),
        ("{law: {area_frac: [0.1, 0.2]}, area_frac: [0.2, 0.3]}", "spatial.area_frac", "spatial.law.area_frac"),
    ],
)
def test_a_setting_under_its_name_of_0_1_0_and_of_today_is_refused(tmp_path: Path, text: str, old: str, new: str) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(f"spatial: {text}\n")
    message = f"{path}: {old}: is called {new} today, which is given too; leave one of them out"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_settings(path, recipe("demo"))


def test_the_table_of_renames_leads_to_settings_that_there_are() -> None:
    everything = {
        law: {"spatial": to_plain(SpatialSettings(law=LAWS[law]())), "dense": to_plain(DenseSpatialSettings())}
        for law in ("paired", "disjoint")
    }
    for place in RENAMED.values():
        held = list(everything.values())
        for name in place.split("."):
            held = [plain[name] for plain in held if name in plain]
        assert held, place
