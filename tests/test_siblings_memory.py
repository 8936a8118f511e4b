"""What layers of one x hold for each other, and that nothing is held after the step."""

import gc
import weakref

import pytest
from blocks import graph_of
from test_siblings import CALLS, an_input, attention, map_layers, step
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora import siblings

ENDS = {
    "backward": lambda y: y.sum().backward(),
    "no backward": lambda y: None,
    "an error in backward": lambda y: fail_in_backward(y),
}


def fail_in_backward(y):
    def fail(_):
        raise KeyError

    y.register_hook(fail)
    with pytest.raises(KeyError):
        y.sum().backward()


@pytest.mark.parametrize("calls", [CALLS["never called"], CALLS["only one"], None], ids=["v missing", "one", "all"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_nothing_is_held_after_the_step(end, calls):
    model = attention()
    step(model, an_input())
    gc.collect()
    gc.disable()  # reference counts must do
    try:
        x = an_input()
        storage = StorageWeakRef(x.untyped_storage())
        y = model(x) if calls is None else calls(model, x)
        end(y)
        del x, y
        assert storage.expired()
        for shared in siblings._thread.recent:
            assert shared.token is None and shared.cast is None and not shared.xas
    finally:
        gc.enable()


def test_a_leaf_dies_without_backward():
    """The token holds x's graph, and that graph would hold a leaf: a leaf's layers are chained to nothing."""
    model = attention()
    x = an_input().detach().requires_grad_()
    storage = StorageWeakRef(x.untyped_storage())
    model(x)
    del x
    assert storage.expired()


def test_backward_lets_go_of_the_graph_though_x_lives():
    model, x = attention(), an_input()
    model(x).sum().backward()
    weight = weakref.ref(model.q_proj.lora_A)
    del model
    assert weight() is None, "the graph that the last token belongs to leads to the adapter"


def test_called_again_with_x_starts_a_graph_of_its_own():
    """Joined to the calls before, as a sibling's would be, it would keep all of them while x lives."""
    model, x = attention(), an_input()
    assert len({len(graph_of(sum(y.sum() for y in map_layers(model, x)))) for _ in range(3)}) == 1


def test_a_model_can_be_deleted():
    model = attention()
    step(model, an_input())
    layer = weakref.ref(model.q_proj)
    model.zero_grad()
    del model
    assert layer() is None
