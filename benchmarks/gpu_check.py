"""Check of one GPU in eight minutes: is every CUDA path right, how fast are real steps, does memory follow the plan?

It installs nothing, prints a table and writes JSON. Sections run in order of their value; one that has not begun when
the time is over is reported as not run. Exit status 1 if anything is wrong.

    python benchmarks/gpu_check.py --out gpu_check.json      # make gpu-check
    python benchmarks/gpu_check.py --dry_run                 # the script itself, tiny, on the CPU
    python benchmarks/gpu_check.py --only layers steps
"""

import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_sections import correctness, speed
from gpu_sections.machine import Finding, Machine, Section
from tools.options import make_parser, write_numbers
from tools.tables import format_header, format_row

SECTIONS: dict[str, Section] = {
    "initial_weights": correctness.check_initial_weights,
    "layers": correctness.compare_attention,
    "repetition": correctness.check_repetition,
    "resume": correctness.check_resume,
    "grouped": correctness.check_grouped_products,
    "generation": correctness.check_generation,
    "waits": correctness.check_waits,
    "rates": speed.measure_rates,
    "steps": speed.measure_steps,
    "fragmentation": speed.measure_fragmentation,
}
WORDS = {True: "ok", False: "WRONG", None: ""}


def run_section(name: str, machine: Machine) -> list[Finding]:
    """Run a section and print its lines as they come; an exception is a finding, too."""
    found: list[Finding] = []
    try:
        for finding in SECTIONS[name](machine):
            found.append(finding)
            print_finding(name, finding)
    except Exception as error:
        traceback.print_exc()
        found.append(Finding("stopped", f"{type(error).__name__}: {str(error)[:300]}", False))
        print_finding(name, found[-1])
    return found


def print_finding(section: str, finding: Finding) -> None:
    """Print one line of the table."""
    print(format_row([section, finding.case, finding.result, WORDS[finding.passed]]), flush=True)


def main() -> None:
    """Run the sections within the time, print a line per finding, write JSON."""
    parser = make_parser(__doc__, out=Path("gpu_check.json"))
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes on the CPU, to try the script itself")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no section after this many seconds")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here. `--dry_run` tries the script itself on the CPU.")
    began, machine = time.monotonic(), Machine(options.dry_run)
    device = "CPU, dry run" if machine.dry else torch.cuda.get_device_name(machine.device)
    print(f"{device}, torch {torch.__version__}\n\n{format_header(['section', 'case', 'result', ''], left=4)}")
    sections: dict[str, Any] = {}
    for name in options.only:
        started = time.monotonic()
        if started - began > options.seconds:
            found = [Finding("all", f"not run: {options.seconds:.0f} s were over", False)]
            print_finding(name, found[0])
        else:
            found = run_section(name, machine)
        sections[name] = {"seconds": time.monotonic() - started, "findings": [vars(each) for each in found]}
    wrong = [
        f"{name}: {each['case']}" for name, s in sections.items() for each in s["findings"] if each["passed"] is False
    ]
    write_numbers(options, {"device": device, "torch": torch.__version__, "sections": sections, "wrong": wrong})
    print(f"\n{time.monotonic() - began:.0f} s. Written: {options.out}")
    if wrong:
        sys.exit(f"{len(wrong)} findings are wrong: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
