"""The part that runs inside a sandbox: standard library only, and no import of the package around it.

Each process starts as `python -I -S -c "…; from inside.NAME import main; main(…)"` with this folder alone bound into
the sandbox, so modules import each other relatively. Importing `typing` takes longer than all other imports together,
so only type checkers import it.
"""
