"""What ptxas makes of a Triton kernel for sm_90, without a GPU: the triton wheel carries the compiler and the disassembler.

    kernels = sass.compile_all([sass.Spec("compress.kernels.fragment", "_matmul", {"x": "*bf16", "M": "i32"}, {"BM": 16}, num_warps=4)])
    kernels[0].per_weight(64)                 # instructions of the main loop for each of the 64 weights that a thread multiplies in it

One subprocess compiles the whole list (two to four seconds a kernel), because a test process has the interpreter switched on when it imports triton,
and a decorated kernel stays what it was. `python tests/sass.py < specs.json` is that subprocess.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
TENSOR_CORE = ("HGMMA", "IGMMA", "QGMMA")  # wgmma in SASS: 16-bit floats, int8, fp8
CONVERSIONS = ("I2F", "I2FP", "STS.U16", "STS.U8")  # what a weight must not cost


def limit(now: float, before: float) -> float:
    """Instructions a weight that a test allows: of Triton 3.9, which tests run with, and of the versions before it, from 3.6 on."""
    return before if tuple(map(int, version("triton").split(".")[:2])) < (3, 9) else now


@dataclass(frozen=True)
class Spec:
    module: str  # where the kernel is
    kernel: str
    signature: dict  # run-time arguments: "*bf16", "i32", …; pointers are taken to be 16-byte aligned
    constants: dict  # compile-time arguments; None leaves an argument out
    aligned: tuple = ()  # integer arguments that are multiples of 16
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Kernel:
    loop: list  # the opcodes of the longest loop, in order; of the whole kernel where there is none
    total: int  # instructions of the kernel
    registers: int
    stack: int  # bytes: what spills goes there
    shared: int  # bytes of shared memory
    code: list = field(repr=False, default_factory=list)  # every instruction
    ptx: str = field(repr=False, default="")

    @property
    def mix(self) -> Counter:
        """Opcodes without their modifiers."""
        return Counter(op.split(".")[0] for op in self.loop)

    def count(self, *prefixes: str) -> int:
        """Instructions of the loop whose opcode is a prefix or begins with it and a dot."""
        return sum(op == p or op.startswith(p + ".") for op in self.loop for p in prefixes)

    def per_weight(self, weights: float) -> float:
        return len(self.loop) / weights


def compile_all(specs: list[Spec]) -> list[Kernel]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        env = {"TRITON_CACHE_DIR": cache} | env | {"PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])}
        run = subprocess.run([sys.executable, __file__], input=json.dumps([asdict(s) for s in specs]), env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return [Kernel(**kernel) for kernel in json.loads(run.stdout)]


def compile_one(spec: Spec) -> Kernel:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(spec.module), spec.kernel)
    names = fn.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*") or name in spec.aligned}
    source = ASTSource(fn=fn, signature=signature, constexprs={(names.index(k),): v for k, v in spec.constants.items()}, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": spec.num_warps, "num_stages": spec.num_stages})
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        read = lambda tool, *args: subprocess.run([str(tools / tool), *args, file.name], capture_output=True, text=True, check=True).stdout
        usage, code = read("cuobjdump", "-res-usage"), read("nvdisasm", "-c")
    instructions, loop = main_loop(code)
    number = lambda what: int(re.search(rf"{what}:(\d+)", usage)[1])
    return Kernel([opcode(i) for i in loop], len(instructions), number("REG"), number("STACK") + number("LOCAL"), kernel.metadata.shared, instructions,
                  kernel.asm["ptx"])  # fmt: skip


def main_loop(code: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the longest backward jump. Padding behind the last EXIT is a jump to itself."""
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    loops = [(labels[jump[1]], i) for i, text in enumerate(instructions) if (jump := re.search(r"BRA.*`\((\.L_\w+)\)", text)) and labels[jump[1]] < i]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(instructions) - 1))
    return instructions, instructions[begin : end + 1]


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


if __name__ == "__main__":
    json.dump([asdict(compile_one(Spec(**spec))) for spec in json.load(sys.stdin)], sys.stdout)
