"""All families of problems."""

from __future__ import annotations

from mind.problems.families.counting import Outfits, Savings
from mind.problems.families.logic import PrizeBox, Ranking
from mind.problems.families.money import Discount, Shopping, Tickets
from mind.problems.families.motion import CatchUp, Travel
from mind.problems.families.people import Ages, Averages, Survey
from mind.problems.families.remainders import Calendar, FairShare
from mind.problems.families.shapes import Border, Fence
from mind.problems.families.sharing import Fractions, Mixture, Ratio
from mind.problems.families.work import Dripping, JointWork, Timetable
from mind.problems.problem import Problem

FAMILIES: tuple[type[Problem], ...] = (
    Shopping, Discount, Tickets, Travel, CatchUp, JointWork, Dripping, Timetable, Ages, Survey, Averages, Border, Fence,
    Ratio, Fractions, Mixture, Outfits, Savings, Ranking, PrizeBox, FairShare, Calendar,
)  # fmt: skip
