"""The whole way on a real pretrained model: SmolLM2-135M-Instruct, from a prompt to the rhythm."""

from __future__ import annotations

import copy

import pytest
import torch

import attnprobe
from attnprobe import metrics
from attnprobe.models import prompt_ids

pytestmark = pytest.mark.slow

RESPONSE = (
    "To find the total number of apples, we first count the apples in each basket. Each basket holds "
    "12 apples, and there are 3 baskets, so there are 3 * 12 = 36 apples. Then we subtract the 6 apples "
    "that were eaten: 36 - 6 = 30. Therefore, 30 apples are left, and the final answer is \\boxed{30}."
)


@pytest.fixture(scope="module")
def batch(smollm2) -> attnprobe.TokenBatch:
    messages = [{"role": "user", "content": "3 baskets of 12 apples, 6 eaten. How many are left?"}]
    return attnprobe.TokenBatch.from_chat(smollm2.tokenizer, messages, RESPONSE)


@pytest.fixture(scope="module")
def statistics(smollm2, batch) -> attnprobe.HeadStatistics:
    return attnprobe.measure(smollm2.model, batch, receiver=True)


def test_statistics_equal_those_of_eager_maps(smollm2, batch, statistics) -> None:
    eager = copy.deepcopy(smollm2.model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        output = eager(batch.input_ids, output_attentions=True)
    assert statistics.layers == tuple(range(30))
    for layer, pattern in enumerate(output.attentions):
        span = metrics.mean_attention_distance(pattern, batch.response_mask)
        waad = metrics.windowed_attention_distance(pattern, batch.response_mask, 10)
        fai = metrics.future_attention_influence(pattern, batch.response_mask)
        close = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
        torch.testing.assert_close(statistics.span[:, layer], span, **close)
        torch.testing.assert_close(statistics.waad[:, layer], waad, **close)
        torch.testing.assert_close(statistics.fai[:, layer], fai, **close)
    entropy = metrics.token_entropy(output.logits, batch.response_mask)
    torch.testing.assert_close(statistics.entropy, entropy, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_heads_are_local_and_global(statistics) -> None:
    """30% of 270 heads each; a trained model has heads that look at neighbours and far back."""
    heads = attnprobe.classify_heads(statistics)
    assert int(heads.local_heads.sum()) == int(heads.global_heads.sum()) == 81
    assert float(heads.span[heads.local_heads].max()) < float(heads.span[heads.global_heads].min())
    assert float(heads.span.min()) < 5
    assert float(heads.span.max()) > 40


def test_texts_join_to_the_response(batch) -> None:
    inside = batch.response_mask[0].nonzero()[:, 0].tolist()
    assert "".join(batch.texts[0][i] for i in inside) == RESPONSE


def test_the_rhythm_has_peaks(smollm2, batch, statistics) -> None:
    heads = attnprobe.classify_heads(statistics)
    scores = attnprobe.score_tokens(statistics, heads)
    rhythm = attnprobe.find_rhythm(scores)
    assert 5 < int(rhythm.preplan.sum()) < 45
    assert 3 < int(rhythm.anchor.sum()) < 45
    assert len(rhythm.pairs()) > 0
    maps = attnprobe.group_maps(smollm2.model, batch, heads)
    waad = metrics.windowed_attention_distance(maps.local_map[:, None], window=10)[0, 0]
    inside = scores.waad[0, maps.columns_of(0)]
    # The map leaves the prompt out; where a token looks back fewer than 10 tokens they agree.
    assert float((waad <= inside + 1e-4).float().mean()) == 1.0


def test_left_padding_changes_nothing(smollm2, batch, statistics) -> None:
    pad = smollm2.tokenizer.pad_token_id or 0
    ids = torch.nn.functional.pad(batch.input_ids, (9, 0), value=pad)
    mask = torch.nn.functional.pad(batch.attention_mask, (9, 0))
    response = torch.nn.functional.pad(batch.response_mask, (9, 0))
    padded = attnprobe.TokenBatch.from_ids(ids, mask, response_mask=response)
    again = attnprobe.measure(smollm2.model, padded)
    torch.testing.assert_close(again.span, statistics.span, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(again.waad[..., 9:], statistics.waad, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_prompt_goes_through_its_chat_template(smollm2) -> None:
    text = smollm2.tokenizer.decode(prompt_ids(smollm2, "Hi", system="Be brief.", chat=None))
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == expected
