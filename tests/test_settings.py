"""The shared keywords of the tasks. Oracle: by hand."""

import inspect

import pytest

import miniflux
from miniflux.settings import SHARED, AdapterSettings, IPSettings, Settings

TASKS = {
    "generate": AdapterSettings, "image_to_image": AdapterSettings, "inpaint": AdapterSettings,
    "fill": Settings, "control": Settings, "redux": Settings,
    "kontext_edit": IPSettings, "kontext_inpaint": IPSettings,
}


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_signature_and_help_list_every_shared_keyword_it_takes(name):
    task = getattr(miniflux, name)
    parameters = inspect.signature(task).parameters
    expected = set(TASKS[name].__annotations__)
    assert expected <= set(parameters) and "settings" not in parameters
    assert set(SHARED) & set(parameters) == expected
    assert all(parameters[each].default == SHARED[each] for each in expected)
    assert all(each in task.__doc__ for each in expected)


def test_every_shared_keyword_has_a_default():
    assert set(SHARED) == set(AdapterSettings.__annotations__)


@pytest.mark.parametrize("task, keyword, hint", [
    ("generate", "num_inference_steps", "did you mean 'steps'"),
    ("generate", "guidence", "did you mean 'guidance'"),
    ("fill", "mask_image", "did you mean 'mask'"),
    ("fill", "controlnet", "help() lists the keywords"),
])
def test_an_unknown_keyword_is_refused_by_name_with_the_nearest_known_one(task, keyword, hint):
    with pytest.raises(TypeError) as error:
        getattr(miniflux, task)(None, "a fox", **{keyword: 1})
    assert f"{task} has no keyword {keyword!r}" in str(error.value) and hint in str(error.value)
