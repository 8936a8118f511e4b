"""Any sequence of what people do with a PEFT model gives the same whether it is patched or not: see `oracle`."""

import oracle_actions as act
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from blocks import CountOps
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from oracle import CASES, Case, Twin, Twins, adapted, in_fp64, nf4
from peft import prepare_model_for_kbit_training
from torch import nn

import fastlora.peft
from fastlora.benchmarks.accuracy import FACTOR
from fastlora.peft import patch

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, which say the same of both twins

LAYERS, HOOKS = st.sampled_from(("siblings", "last")), st.sampled_from(("forward", "forward_pre", "full_backward"))
PLACES = ("", ".base_layer", ".lora_A.default", ".lora_B.default")


class Machine(RuleBasedStateMachine):
    """One model; each rule is what a user does to it. It ends when its adapters are unloaded."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.twins, self.over = case, Twins(case), False
        with_places = {f"{end}{place}" for end in (*case.siblings, case.last) for place in PLACES}
        self.places = (*sorted(with_places), case.mlp, case.activation)

    def do(self, action, *args) -> None:
        self.twins.do(action, *args)

    def adapters(self) -> list[str]:
        return sorted(self.twins.plain.model.peft_config)

    @initialize(first=st.booleans())
    def begin(self, first):
        if first:
            self.do(act.patch)

    alive = precondition(lambda self: not self.over)

    @alive
    @rule()
    def patch(self):
        self.do(act.patch)

    @alive
    @rule()
    def unpatch(self):
        self.do(act.unpatch)

    @alive
    @rule(batches=st.sampled_from((1, 1, 2)))
    def train_step(self, batches):
        self.do(act.train_step, batches)

    @alive
    @rule(mode=st.sampled_from(("train", "evaluate", "without_grad", "in_inference_mode", "without_tokens")))
    def run_mode(self, mode):
        self.do(getattr(act, mode))

    @alive
    @rule(batch=st.sampled_from((1, 2)))
    def generate(self, batch):
        self.do(act.generate, batch)

    @alive
    @rule(use_reentrant=st.sampled_from((True, False, None)))
    def checkpointing(self, use_reentrant):
        self.do(act.checkpointing, use_reentrant)

    @alive
    @rule(extent=st.sampled_from((None, "forward", "throughout")))
    def autocast(self, extent):
        self.do(act.autocast, extent)

    @alive
    @rule(name=st.sampled_from(("second", "third")), kind=st.sampled_from(sorted(act.KINDS_OF_ADAPTER)))
    def add_adapter(self, name, kind):
        if name not in self.adapters():
            self.do(act.add_adapter, name, kind)

    @alive
    @rule(name=st.sampled_from(("second", "third")))
    def delete_adapter(self, name):
        if name in self.adapters():
            self.do(act.delete_adapter, name)

    @alive
    @rule(names=st.lists(st.sampled_from(("default", "second", "third")), min_size=1, max_size=3, unique=True))
    def set_adapters(self, names):
        self.do(act.set_adapters, *(name for name in names if name in self.adapters()))

    @alive
    @rule(state=st.sampled_from(("with_adapters_disabled", "disable_adapters", "enable_adapters")))
    def switch_adapters(self, state):
        self.do(getattr(act, state))

    @alive
    @rule(merge=st.booleans())
    def merge(self, merge):
        self.do(act.merge_adapter if merge else act.unmerge_adapter)

    @alive
    @rule(how=st.sampled_from(("save_and_load", "hotswap", "prepare_hotswap")))
    def exchange_adapter(self, how):
        if not (how == "hotswap" and len(self.adapters()) > 1):
            self.do(getattr(act, how))

    @alive
    @rule(how=st.sampled_from(("deep_copy", "pickle")))
    def copy(self, how):
        self.do(getattr(act, how))

    @alive
    @rule(dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)), adapters_only=st.booleans())
    def to_dtype(self, dtype, adapters_only):
        self.do(act.adapters_to_dtype if adapters_only else act.to_dtype, dtype)

    @alive
    @rule(layer=LAYERS, part=st.sampled_from(("lora_A", "lora_B", "base_layer")), flag=st.booleans())
    def require_grad(self, layer, part, flag):
        self.do(act.require_grad, self.name(layer), part, flag)

    @alive
    @rule(layer=LAYERS)
    def replace_by_linear(self, layer):
        self.do(act.replace_by_linear, self.name(layer))

    @alive
    @rule(module=st.sampled_from((nn.SiLU(), nn.Tanh(), act.Scaled())))
    def set_activation(self, module):
        self.do(act.set_activation, module)

    @alive
    @rule(attribute=st.sampled_from(("scale", "forward")))
    def change_activation(self, attribute):
        self.do(act.set_in_activation, attribute, torch.tanh if attribute == "forward" else 0.25)

    @alive
    @rule(place=st.integers(0, 20), kind=HOOKS)
    def add_hook(self, place, kind):
        self.do(act.add_hook, self.places[place % len(self.places)], kind)

    @alive
    @rule(layer=st.sampled_from(("siblings", "last", "mlp")))
    def add_in_place_hook(self, layer):
        self.do(act.add_in_place_hook, self.name(layer))

    @alive
    @rule()
    def remove_hooks(self):
        self.do(act.remove_hooks)

    @alive
    @rule(
        layer=st.sampled_from(("siblings", "last", "mlp")),
        shape=st.sampled_from(((), (5,), (2, 3), (2, 1, 3), (0,), (2, 0))),
        how=st.sets(st.sampled_from(("no dx", "in place", "transposed", "no grad", "large")), max_size=2),
    )
    def call(self, layer, shape, how):
        self.do(act.call, self.name(layer), shape, tuple(sorted(how)))

    @alive
    @rule(how=st.sampled_from(("backward_through_each", "no_grad_between", "inputs_left")))
    def call_siblings(self, how):
        self.do(getattr(act, how))

    @alive
    @rule(merge=st.booleans())
    def unload(self, merge):
        self.do(act.merge_and_unload if merge else act.unload)
        self.over = True

    @precondition(lambda self: self.over)
    @rule()
    def run_unloaded(self):
        self.do(act.without_grad)

    def name(self, layer: str) -> str:
        """The end of the name of a layer of the case."""
        end = getattr(self.case, layer)
        return end if isinstance(end, str) else end[0]


class CompilingMachine(Machine):
    """It also compiles the model, as it is then."""

    @Machine.alive
    @rule(grad=st.booleans())
    def compiled(self, grad):
        self.do(act.compiled, grad)


def run(case: str, max_examples: int, steps: int, machine: type[Machine] = Machine) -> None:
    sizes = settings(max_examples=max_examples, stateful_step_count=steps)
    run_state_machine_as_test(lambda: machine(CASES[case]), settings=sizes)


@pytest.mark.parametrize("case", CASES)
def test_any_sequence(case, bitsandbytes_eager):
    run(case, max_examples=3, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_any_long_sequence(case, bitsandbytes_eager):
    run(case, max_examples=200, steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_any_sequence_with_compiling(case):
    run(case, max_examples=40, steps=12, machine=CompilingMachine)


Q, LAST = CASES["llama"].siblings[0], CASES["llama"].last
IN_PLACE = ("in place",)
SEQUENCES = {
    "in place on the output of a layer, x 1-D": [(act.call, Q, (), IN_PLACE)],
    "in place on the output of a layer, x 3-D": [(act.call, Q, (2, 3), IN_PLACE)],
    "in place on the output of a layer, x 4-D": [(act.call, Q, (2, 1, 3), IN_PLACE)],
    "in place on the output of a layer, no tokens": [(act.call, Q, (2, 0), IN_PLACE)],
    "in place on the output of an MLP": [(act.call, "mlp", (2, 3), IN_PLACE)],
    "in place in a hook on a layer": [(act.add_in_place_hook, Q), (act.train_step,)],
    "in place in a hook on an MLP": [(act.add_in_place_hook, "mlp"), (act.train_step,)],
    "in place under checkpointing": [
        (act.add_in_place_hook, Q),
        (act.add_in_place_hook, "mlp"),
        (act.checkpointing, False),
        (act.train_step,),
    ],
    "merge and unload": [(act.merge_and_unload,)],
    "unload": [(act.unload,)],
    "a layer of an MLP replaced": [(act.replace_by_linear, LAST)],
    "activation replaced": [(act.set_activation, nn.ReLU())],
    "activation's forward replaced": [(act.set_in_activation, "forward", torch.relu)],
    "activation's attribute changed": [
        (act.set_activation, act.Scaled()),
        (act.patch,),
        (act.set_in_activation, "scale", 2.0),
    ],
    "activation hooked": [(act.add_hook, "mlp.act_fn", "forward"), (act.add_hook, "mlp.act_fn", "full_backward")],
    "activation clamped": [
        (act.set_activation, act.Clamped(16.0)),
        (act.patch,),
        (act.call, "mlp", (2, 3), ("large",)),
    ],
    "MLP's flag changed": [(act.set_mlp_class, act.OneSided), (act.patch,), (act.set_in_mlp, "flag", True)],
    "MLP that minds the length": [(act.set_mlp_class, act.OneSided), (act.patch,), (act.call, "mlp", (1, 12))],
    "MLP that minds the batch": [(act.set_mlp_class, act.OneSided), (act.patch,), (act.call, "mlp", (3, 4))],
    "MLP that minds grad mode": [(act.set_mlp_class, act.OneSided), (act.patch,), (act.without_grad,)],
    "hooks during patch": [
        (act.unpatch,),
        (act.add_hook, LAST, "forward"),
        (act.add_hook, "mlp.act_fn", "forward"),
        (act.patch,),
    ],
    "compiled without grad": [(act.compiled, False)],
    "adapters' weights as attributes": [(act.weights_as_attributes,)],
    "weights as attributes under checkpointing": [
        (act.weights_as_attributes,),
        (act.checkpointing, False),
        (act.train_step,),
    ],
    "inputs that are leaves, under autocast": [(act.autocast, "forward"), (act.inputs_left,)],
    "backward under autocast": [(act.autocast, "throughout"), (act.train_step,)],
}


@pytest.mark.parametrize("steps", SEQUENCES.values(), ids=SEQUENCES)
def test_sequence(steps):
    twins = Twins(CASES["llama"])
    for action, *args in [(act.patch,), *steps]:
        twins.do(action, *args)
    assert twins.passes == len(steps) + 1


@pytest.mark.parametrize(
    "case", ("neox, biases trained", "gpt2", "nf4 in lora.Linear", "nf4 in lora.Linear4bit", "llama bf16")
)
@pytest.mark.parametrize("name", ("in place in a hook on an MLP", "unload", "backward under autocast"))
def test_sequence_on(case, name, bitsandbytes_eager):
    twins = Twins(CASES[case])
    for action, *args in [(act.patch,), *SEQUENCES[name]]:
        args = [CASES[case].siblings[0] if arg == Q else arg for arg in args]
        twins.do(action, *args)
    assert twins.passes == len(SEQUENCES[name]) + 1


@pytest.mark.parametrize("case", ("nf4, dora", "llama bf16, dora"))
@pytest.mark.parametrize("how", ((), IN_PLACE), ids=("", "in place"))
@pytest.mark.parametrize("shape", ((), (2, 3)), ids=("a vector", "x 3-D"))
@pytest.mark.parametrize("module", (Q, "mlp"))
def test_dora_takes_the_shapes_and_changes_of_peft(module, shape, how, case, bitsandbytes_eager):
    """PEFT makes a matrix of a vector; ours keeps the outputs of layers and MLPs for the gradient of magnitudes."""
    twins = Twins(CASES[case])
    twins.do(act.patch)
    twins.do(act.call, module, shape, how)


@pytest.mark.parametrize("scale", (1.02, 0.98))
def test_nearly_the_same_activation_in_half_precision(scale):
    """What differs by a few roundings is another function: over enough elements that is no matter of chance."""
    twins = Twins(CASES["llama bf16"])
    activation = act.Scaled()
    activation.scale = scale
    twins.do(act.set_activation, activation)
    twins.do(act.patch)
    truth = act.call(Twin(twins.plain.case, in_fp64(twins.plain.model)), "mlp", (512,), ("no grad",))["y"]
    ours, theirs = (act.call(twin, "mlp", (512,), ("no grad",))["y"].double() for twin in (twins.fast, twins.plain))
    assert (ours - truth).norm() <= FACTOR * (theirs - truth).norm()


@pytest.mark.parametrize("kind", ("plain", "dora"))
def test_patch_calls_no_4bit_layer_in_a_mode_that_may_repack_it(kind, monkeypatch):
    """In eval and without grad bitsandbytes repacks a weight on some CPUs, and later trains with wrong gradients."""
    calls = []
    forward = Linear4bit.forward

    def watched(layer, x):
        calls.append((layer.training, torch.is_grad_enabled()))
        return forward(layer, x)

    model = adapted(CASES["nf4 in lora.Linear4bit"], **act.KINDS_OF_ADAPTER[kind]).train()
    monkeypatch.setattr(Linear4bit, "forward", watched)
    patch(model)
    assert (False, False) not in calls


@pytest.mark.parametrize("compute_dtype", (torch.bfloat16, None), ids=str)
@pytest.mark.parametrize("loaded_in_4bit", (False, True))
def test_prepared_for_kbit_training(loaded_in_4bit, compute_dtype, bitsandbytes_eager):
    """Then x is in fp32 whatever the layers compute in. What is reported as one function runs as one."""

    def base():
        model = nf4(loaded_in_4bit, compute_dtype)
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    case = CASES["nf4 in lora.Linear"]._replace(base=base)
    twins = Twins(case)
    twins.do(act.patch)
    twins.do(act.train_step)
    with CountOps() as ran:
        act.without_grad(twins.fast)
    assert ran.names["fastlora::swiglu"] == len(patch(twins.fast.model).fused)


def test_a_patched_model_prints_as_an_unpatched_one():
    twins = Twins(CASES["llama"])
    twins.do(act.patch)
    assert repr(twins.fast.model) == repr(twins.plain.model)


def test_the_oracle_sees_what_is_wrong(monkeypatch):
    """A scaling that is off by 1% on the way."""
    fused_forward = fastlora.peft_layers.fused_forward

    def wrong(base_layer, kind, x, adapter, *more):
        return fused_forward(base_layer, kind, x, adapter._replace(scaling=1.01 * adapter.scaling), *more)

    monkeypatch.setattr(fastlora.peft_layers, "fused_forward", wrong)
    twins = Twins(CASES["llama"])
    with pytest.raises(AssertionError, match=r"one_pass\(\): .* differs from plain PEFT's"):
        twins.do(act.patch)
