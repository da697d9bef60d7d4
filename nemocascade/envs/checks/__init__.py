"""Checks that run in killable children. These modules import no other part of NemoCascade."""
