"""A head that from_pretrained has made anew: a patch that would leave it untrained says so."""

import warnings

import pytest
import torch
import transformers

import c3a
from tiny_model import write_model

Classifier = transformers.AutoModelForSequenceClassification


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "masked"
    return write_model(folder, kind=transformers.BertForMaskedLM)


@pytest.fixture(autouse=True)
def transformers_is_quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def said_of(model, targets, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        c3a.patch_model(model, targets, "auto", **options)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("targets", ["all-linear", ["query"]], ids=["adapted", "frozen"])
def test_a_new_head_that_would_not_be_trained_is_named_with_the_argument(base, targets):
    model = Classifier.from_pretrained(base)
    assert said_of(model, targets) == [
        "c3a.patch_model: classifier: weights that the model's checkpoint did not hold are random, "
        "and would stay so, for they are frozen; to train them and save them with the adapter, "
        "pass modules_to_save=['classifier']"
    ]
    assert c3a.summary(model).layers
    c3a.unpatch_model(model)
    assert said_of(model, targets, modules_to_save=["classifier"]) == []


def test_what_is_new_below_the_head_is_named_too(masked):
    model = Classifier.from_pretrained(masked)
    [said] = said_of(model, ["query"], modules_to_save=["classifier"])
    assert said.startswith("c3a.patch_model: bert.pooler: weights")
    assert said.endswith("modules_to_save=['classifier', 'bert.pooler']")


def test_a_head_of_several_layers_is_named_as_a_whole_or_by_what_is_left(tmp_path):
    config = transformers.RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path)
    [said] = said_of(model, ["query"])
    assert said.endswith("modules_to_save=['classifier']")
    c3a.unpatch_model(model)
    [said] = said_of(model, ["query"], modules_to_save=["out_proj"])
    assert said.endswith("modules_to_save=['classifier.out_proj', 'classifier.dense']")


def test_a_head_of_another_size_than_the_checkpoints_is_new(base, tmp_path):
    Classifier.from_pretrained(base).save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert len(said_of(model, ["query"])) == 1


def test_what_is_not_known_to_be_a_new_head_is_left_in_peace(base, masked, tmp_path):
    Classifier.from_pretrained(base).save_pretrained(tmp_path)
    fine_tuned = Classifier.from_pretrained(tmp_path)
    resized = transformers.AutoModelForMaskedLM.from_pretrained(masked, tie_word_embeddings=False)
    resized.resize_token_embeddings(40)
    for model in (
        fine_tuned,
        fine_tuned.half(),
        Classifier.from_config(fine_tuned.config),
        transformers.AutoModel.from_pretrained(masked),  # its pooler is new, and may not be used
        transformers.AutoModelForMaskedLM.from_pretrained(masked),
        resized,
    ):
        assert said_of(model, ["query"]) == []
        c3a.unpatch_model(model)


def test_loading_an_adapter_says_nothing(base, tmp_path):
    model = Classifier.from_pretrained(base)
    c3a.patch_model(model, ["query"], 6, modules_to_save=["classifier"])
    c3a.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c3a.load_adapter(Classifier.from_pretrained(base), tmp_path)


def test_where_warnings_are_errors_the_model_is_as_it_was(base):
    model = Classifier.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="classifier"):
            c3a.patch_model(model, ["query"], 6)
    assert not any(isinstance(module, c3a.C3ALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.classifier, torch.nn.Linear)
