"""Training in several places that exchange weights rarely (docs/places.md).

outer.py has what the places share and the outer optimizer's step, agenda.py what a meeting does,
meetings.py the lighthouse and the exchange, place.py the trainer's side.
"""
