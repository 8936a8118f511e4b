import pytest

from fastlora import plans
from fastlora.plans import Problem, choose


def test_every_op_has_a_rule_that_gives_its_plans():
    assert plans.RULES.keys() == plans.PLANS.keys()
    for op, names in plans.PLANS.items():
        for M in (0, 1, 64, 8192):
            for r in (1, 16, 512):
                for p in (0.0, 0.1):
                    assert choose(op, Problem(M, 4096, 4096, r, p)) in names


def test_rules_follow_from_what_moves():
    def lora_matmul(**sizes):
        return choose("lora_matmul", Problem(**{"M": 8192, "N": 4096, "K": 4096, "r": 16} | sizes))

    assert lora_matmul(intensity=214.0) == "tail"
    assert lora_matmul(K=1 << 15) == "base_last", "one more pass over y is nothing beside a long reduction"
    assert lora_matmul(r=4096) == "base_last", "the adapter is as large as the base"
    assert lora_matmul(itemsize=4) == "base_last", "fp32 is the vendor's"
    assert choose("lora_grad", Problem(8192, 4096, 4096, 16)) == "one_pass"
    assert choose("lora_grad", Problem(8192, 4096, 4096, 128)) == "two_pass"
    assert choose("linear_4bit", Problem(8192, 4096, 4096, 16)) == "merged"
    assert choose("linear_4bit", Problem(8192, 4096, 4096, 16, p=0.1)) == "decoded"
    assert choose("linear_4bit", Problem(1, 4096, 4096, 16)) == "fused"


def test_measured_beats_the_rule_and_forced_beats_both(monkeypatch):
    problem = Problem(5000, 4096, 4096, 16)
    assert choose("lora_matmul", problem, "a GPU") == "tail"
    monkeypatch.setitem(plans.MEASURED, ("a GPU", "lora_matmul", 8192, 4096, 4096, 16), "base_last")
    assert choose("lora_matmul", problem, "a GPU") == "base_last"
    assert choose("lora_matmul", problem, "another") == "tail"
    with plans.use(lora_matmul="tail", lora_grad="two_pass"):
        assert choose("lora_matmul", problem, "a GPU") == "tail"
        with plans.use(lora_matmul="base_last"):
            assert choose("lora_grad", problem) == "two_pass"
            assert choose("lora_matmul", problem) == "base_last"
    assert choose("lora_grad", problem) == "one_pass"


@pytest.mark.parametrize("wrong", [{"lora_matmul": "fastest"}, {"shrink": "tail"}])
def test_a_plan_that_does_not_exist_is_an_error(wrong):
    (op, plan), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"lora_matmul=tail, .* got {op}={plan}"), plans.use(**wrong):
        pass
