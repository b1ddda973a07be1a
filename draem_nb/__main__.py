"""`python -m draem_nb`: the command `draem_nb`. The one module here that no notebook writes."""
import sys

if __name__ == '__main__':      # a worker process imports this module too
    from draem_nb.cli import main
    sys.exit(main())
