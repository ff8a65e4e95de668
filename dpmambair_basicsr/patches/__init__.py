"""Patches of BasicSR, by topic. `apply` decides when they are applied; `registry` has the decorator.

    imports       modules that BasicSR imports but that no longer exist; the hook that registers our classes
    options       option files: validated up front, safe YAML, values of --force_yml
    run_lock      one process group per run folder
    distributed   several processes, with and without GPUs
    fixes         functions that fail on current libraries, or fail silently
    ssim          SSIM in half the time
    images        image files: written atomically, of bounded size, regular files only
    logs          logs and plots never end a training
    checkpoints   atomic networks and states
    resume        what happens on resume
    seeding       the randomness of an item depends only on the seed and its position
    signals       start of an iteration: stop if a signal was received, otherwise seed

A patch's docstring says what the patched function does, then `Fixes:` (the defect, and the function of BasicSR 1.4.2
that has it) and `Remove once:`. tests/test_patches.py runs a regression test of each with and without it: once the
original passes, the test fails and the patch can be removed.
"""
