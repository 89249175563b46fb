"""The JSON schema that editors complete pool.yaml from: as the models say, and as strict as they are."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from paths import DEPLOY

from dinov3_ray.pool.poolfile import pool_schema
from dinov3_ray.pool.spec import PoolOptions

SCHEMA = json.loads((DEPLOY / "pool.schema.json").read_text())
EXAMPLE = (DEPLOY / "pool.yaml").read_text()


def test_it_is_up_to_date() -> None:
    assert pool_schema() == SCHEMA, "run: python -m dinov3_ray.pool.poolfile > deploy/pool.schema.json"


def test_the_example_names_it_and_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert EXAMPLE.startswith("# yaml-language-server: $schema=pool.schema.json\n")
    jsonschema.validate(yaml.safe_load(EXAMPLE), SCHEMA)
    jsonschema.validate({"teacher": {"root": "model"}}, SCHEMA)
    jsonschema.validate({"teacher": {"root": "model", "image_size": "input/2"}}, SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"replica": 2},
        {"teacher": {}},
        {"teacher": {"root": 3}},
        {"teacher": {"root": "model", "dtype": "float4"}},
        {"teacher": {"root": "model", "image_size": [224]}},
        {"teacher": {"root": "model", "image_size": "input/3"}},
        {"replicas": 0},
        {"replicas": "many"},
        {"replicas": [1, 2, 3]},
        {"name": "a b"},
        {"namespace": ""},
        {"placement": {"num_gpus": -1}},
        {"placement": {"num_gpu": 1}},
        {"placement": {"labels": {"zone": 1}}},
        {"options": {"max_bach": 4}},
        {"options": {"max_batch": 0}},
        {"options": {"max_batch": 1.5}},
        {"options": {"hang_timeout": 0}},
        {"options": {"batching": "fast"}},
    ],
    ids=str,
)
def test_mistakes_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**yaml.safe_load(EXAMPLE), **change}, SCHEMA)


def test_an_editor_shows_what_each_option_means_and_its_default() -> None:
    options = SCHEMA["$defs"]["PoolOptions"]["properties"]
    assert options.keys() == PoolOptions.model_fields.keys()
    for name, option in options.items():
        assert option["description"]
        assert option["default"] == getattr(PoolOptions(), name)
