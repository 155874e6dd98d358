"""What a teacher is told in each context, unless a run has templates of its own."""

AGAIN = "Solve the problem yourself, in your own words. Reason step by step, then state the final answer."
ANSWER = "{problem}\n\nThe final answer is {answer}.\n\n" + AGAIN
PARTIAL = (
    "{problem}\n\nA reference solution begins like this.\n\n{steps}\n\nIts final answer is {answer}.\n\n"
    + AGAIN
)
STEPS = "{problem}\n\nA reference solution begins like this.\n\n{steps}\n\n" + AGAIN
RUBRIC = "{problem}\n\nA response is judged by this rubric.\n\n{rubric}\n\nRespond so that it is met in full."
FEEDBACK = "{problem}\n\nFeedback on an earlier attempt follows.\n\n{feedback}\n\n" + AGAIN
SKILL = "{problem}\n\nThis is known to help with such problems.\n\n{skill}\n\n" + AGAIN
HINT = "{problem}\n\nHint: {hint}\n\n" + AGAIN
DEMONSTRATION = "{problem}\n\nA correct solution follows.\n\n{demonstration}\n\n" + AGAIN
BOTH = (
    "{problem}\n\nA correct solution follows.\n\n{demonstration}\n\n"
    "Feedback on an earlier attempt follows.\n\n{feedback}\n\n" + AGAIN
)
FOLLOW_UP = (
    "{problem}\n\nThe reply to this message will be answered with:\n\n{follow_up}\n\n"
    "Reply to the message so that this has been heeded from the start, without mentioning it."
)
CRITIQUE = "{problem}\n\nAn attempt and what is to be said of it follow.\n\n{critique}\n\n" + AGAIN
DEBATE = "{problem}\n\nSeveral experts have discussed the problem.\n\n{debate}\n\n" + AGAIN
REVISION = "{problem}\n\nThis is an attempt.\n\n{attempt}\n\n{control}"
REPHRASE = "The attempt is correct. Write the solution again, clearly and without detours."
RETRY = "The attempt is wrong. Find out where, then solve the problem again from the start."
# Options that are templates of another context, for rows in which their own has nothing to tell.
FALLBACKS = {
    "partial_solution": {"answer_template": "answer_only"},
    "sibling": {"feedback_template": "feedback"},
}
