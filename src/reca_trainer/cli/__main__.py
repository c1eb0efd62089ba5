from reca_trainer.cli import main

raise SystemExit(main())
