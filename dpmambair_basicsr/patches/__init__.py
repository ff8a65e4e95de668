"""Patches of BasicSR, by topic; `apply` says when they are applied and `registry` how one is written.

    imports       modules that BasicSR imports and that no longer exist; the hook that registers us
    options       option files: validated up front, safe YAML, values of --force_yml
    run_lock      the folder of a run belongs to one process group
    distributed   several processes, with and without GPUs
    fixes         functions that fail on current libraries, or silently
    ssim          SSIM in half the time
    images        image files whole, of bounded size, and regular
    logs          logs and plots never end a training
    checkpoints   atomic networks and states
    resume        what happens on resume
    seeding       the randomness of an item depends on the seed and its place alone
    signals       the beginning of an iteration: end where a signal asks for it, or seed

A patch's docstring says what the patched function does, then `Fixes:` (the defect, and the function of BasicSR 1.4.2
that has it) and `Remove once:`. tests/test_patches.py runs a regression of each with and without it: once the original
passes, the test fails and the patch can go.
"""
