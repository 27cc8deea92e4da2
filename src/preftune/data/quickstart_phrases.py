"""What the quickstart's pairs are made of: prompt templates, subjects and phrase pools.

Everything here is text that ``quickstart_pairs`` composes. The blocks are plain strings, one
phrase a line, because several hundred quoted tuples would be far harder to read and to proof.

Slots: ``{ger}`` is the task as a gerund, ``{s1}`` its first step, ``{both}`` its two steps
joined, ``{s2}`` its second step, ``{why}`` the reason the steps work. Steps are bare infinitives,
so that they read well both as an order ("rub it") and after "to", "you" and "I'd".
"""

TRAIN_TEMPLATES = """
How do I {task}?
What is the best way to {task}?
Can you help me {task}?
I want to {task}. Where do I start?
Any tips on how to {task}?
What should I know before I {task}?
Could you tell me how to {task}?
I'm new at this. How can I {task}?
Please explain how to {task}.
What's a simple way to {task}?
I need to {task} this weekend. What would you do?
How would you {task}?
Is there a good method to {task}?
I keep failing to {task}. What am I missing?
Give me some advice on {ger}.
Tell me about {ger}.
What matters most when {ger}?
I'd like to get better at {ger}. Any ideas?
What do people get wrong about {ger}?
My neighbour asked me how to {task}. What do I say?
"""

HELDOUT_TEMPLATES = """
What's the secret to {ger}?
Help! I have no idea how to {task}.
If I had to {task} today, what should I do first?
How does someone {task} without much fuss?
I have never tried {ger}. What do you suggest?
Do you have a good trick to {task}?
"""

# "# topic", then two lines a subject: "verb/gerund rest | first step", "second step | reason".
# The last two subjects of a topic are held out.
SUBJECTS = """
# kitchen
clean/cleaning a cast-iron pan | rub it with coarse salt and a little oil
  dry it on a warm stove | salt lifts the grime and heat keeps the rust away
cook/cooking fluffy rice | rinse the grains until the water runs clear
  let the pot rest with the lid on | the steam finishes every grain evenly
chop/chopping an onion without tears | chill the onion for twenty minutes
  cut it with a very sharp knife | a cold onion lets go of less stinging gas
poach/poaching an egg | keep the water at a gentle simmer
  slide in a fresh egg from a cup | a fresh egg holds its shape in calm water
keep/keeping fresh herbs crisp | stand the trimmed stems in a glass of water
  cover the leaves loosely with a bag | the stems drink while the leaves stay moist
roast/roasting vegetables | spread them out in one layer with some oil
  turn them once in a hot oven | steam escapes and the edges turn golden
make/making a thick tomato soup | roast the tomatoes with garlic and an onion
  blend in a slice of bread | bread thickens the soup without any cream
bake/baking a crusty loaf | let the dough rise until it doubles
  bake it in a hot pot with a lid | trapped steam gives a crisp crust
# cleaning
remove/removing red wine from a shirt | blot the stain with cold water
  cover it with salt for an hour | salt draws the colour out of the cloth
descale/descaling a kettle | boil equal parts of water and vinegar in it
  rinse it twice with clean water | the acid dissolves the chalky crust
tidy/tidying a messy room | fill one box with things that live elsewhere
  clear a single surface | one clean spot makes the rest feel possible
wash/washing windows without streaks | wipe the glass with water and a drop of soap
  dry it with a rubber blade | the blade takes the water off before it can spot
freshen/freshening a smelly fridge | throw out whatever is past its best
  leave a bowl of baking soda inside | baking soda soaks up the smells
clean/cleaning a computer keyboard | turn it over and shake out the crumbs
  wipe the keys with a damp cloth | loose crumbs go first and never turn to paste
wash/washing a wool sweater | soak it in cool water with mild soap
  dry it flat on a towel | wool keeps its shape when nothing pulls at it
get/getting wax out of a carpet | harden the wax with a bag of ice
  scrape it off with a dull knife | cold wax snaps away from the fibres
# garden
grow/growing tomatoes on a balcony | pick a deep pot and a sunny corner
  water the soil every morning | steady water keeps the fruit from splitting
keep/keeping a fern alive indoors | stand it away from direct sun
  mist the leaves every other day | ferns love the damp shade of a forest
start/starting a compost heap | mix kitchen scraps with dry leaves
  turn the heap every week | air and leaves keep it sweet and warm
prune/pruning a rose bush | cut the dead wood away in early spring
  trim just above an outward bud | new shoots then grow towards the light
attract/attracting bees to a garden | plant lavender and thyme in a sunny bed
  leave a shallow dish of water out | bees come back to food they can rely on
sow/sowing a small lawn | rake the soil until it is fine and level
  keep the seeds damp for two weeks | seeds sprout when they never dry out
save/saving a drooping houseplant | feel the soil with a fingertip
  water it only if it is dry | too much water hurts roots as often as too little
grow/growing herbs on a windowsill | choose pots with holes in the bottom
  pinch the tips every week | pinched plants grow bushy instead of tall
# sleep
fall/falling asleep faster | put the phone in another room
  read a paper book for a while | a dim quiet hour tells the body it is night
wake/waking up early | move bedtime forward by fifteen minutes
  open the curtains right away | morning light resets the inner clock
take/taking a good nap | set an alarm for twenty minutes
  lie down before three o'clock | a short nap stops before deep sleep begins
sleep/sleeping well on a hot night | close the blinds through the afternoon
  use a thin cotton sheet | the body sleeps best when it can cool down
stop/stopping late coffee from spoiling the night | drink the last cup before noon
  switch to herbal tea | coffee stays in the blood for many hours
calm/calming a racing mind at bedtime | write tomorrow's worries on paper
  breathe out slowly ten times | a written worry stops going round in circles
recover/recovering from jet lag | go out in the morning sun
  eat meals at local times | light and food set the clock together
build/building an evening routine | choose one quiet thing to do at nine
  dim the lamps at the same time | the same signal each night becomes a habit
# exercise
train/training for a first five-kilometre run | jog for one minute and walk for two
  add a minute each week | slow growth lets the legs keep up
stretch/stretching a stiff back | lie down and pull both knees to the chest
  hold it for thirty seconds | the muscles let go when there is no hurry
learn/learning to do a push-up | practise against a wall or a table
  lower the angle every week | a gentle slope builds strength safely
start/starting to swim laps | swim one slow length and rest
  count breaths instead of metres | calm breathing saves more energy than speed
keep/keeping a workout habit | lay the clothes out the night before
  promise only ten minutes | a small promise is easy to keep
cycle/cycling up a steep hill | change to a low gear before the slope
  pedal at an even pace | easy gears spare the knees
improve/improving balance | stand on one leg while brushing teeth
  close both eyes for a few seconds | tiny muscles learn from tiny wobbles
walk/walking more each day | get off the bus one stop early
  take every phone call on foot | small walks add up without any planning
# study
remember/remembering new vocabulary | write each word in a silly sentence
  test it again after two days | funny pictures stick in the memory
prepare/preparing for a maths exam | solve old papers against the clock
  rework every mistake by hand | mistakes show exactly what to learn next
take/taking useful lecture notes | leave a wide margin on each page
  sum up the page in one line | a short summary makes you think it through
focus/focusing on a long book | read for twenty-five minutes at a time
  put the phone in a drawer | short sprints keep the mind fresh
learn/learning to type faster | keep the fingers on the home row
  go slowly until no key is wrong | speed follows once the moves are sure
practise/practising a foreign language | talk aloud about the day for five minutes
  look up the words that were missing | speaking shows which words are needed
understand/understanding a hard chapter | explain it aloud to an empty chair
  reread only the part that broke down | a clear retelling shows where the gaps are
stop/stopping procrastination on homework | open the book and do just one line
  set a timer for ten minutes | starting is the only hard part
# writing
write/writing a thank-you note | name the gift and one way it was used
  send it within a week | one real detail shows that it mattered
start/starting a short story | give the hero a small urgent problem
  write the first scene in one go | a problem makes readers turn the page
edit/editing a long essay | read every sentence aloud
  cut any word that trips the tongue | the ear catches what the eye forgives
write/writing a clear email | put the request in the first line
  keep it to five sentences | busy readers answer what they see first
keep/keeping a diary | write three lines before bed
  leave the notebook on the pillow | a tiny page is never a burden
give/giving a short speech | choose one story and one point
  practise it twice on a walk | listeners remember stories best
write/writing a simple poem | describe one object with all five senses
  break the lines where a breath falls | concrete things carry feeling on their own
finish/finishing a first draft | write badly on purpose for an hour
  save all corrections for later | a rough page can be fixed but a blank one cannot
# travel
pack/packing a light suitcase | lay everything out and remove a third
  roll the clothes tightly | most clothes stay unworn on a trip
find/finding cheap train tickets | search for seats two months ahead
  travel in the middle of the week | quiet days have the cheapest seats
survive/surviving a long flight | take an aisle seat and a water bottle
  stand up once an hour | moving about keeps the legs from swelling
explore/exploring a new city | walk without a plan for one morning
  ask a baker where to have lunch | locals know what no guidebook prints
travel/travelling with a toddler | bring snacks and one new toy
  stop to play every two hours | a surprise buys a peaceful hour
avoid/avoiding seasickness | sit in the middle of the boat
  watch the horizon | the eyes and ears then agree on the motion
plan/planning a weekend hike | choose a loop with an early way out
  tell a friend the route | a short cut home keeps the day safe
pitch/pitching a tent in the rain | put the outer sheet up first
  build the rest beneath it | a roof overhead keeps the bed dry
# pets
bathe/bathing a nervous dog | spread some peanut butter on the tub wall
  pour lukewarm water slowly | a busy tongue forgets to be afraid
teach/teaching a puppy to sit | raise a treat above its nose
  reward it as soon as it sits | quick rewards show which move was right
settle/settling a new cat at home | give it one quiet room with a hiding place
  sit on the floor and wait | cats trust people who let them come closer
brush/brushing a long-haired rabbit | start with short strokes on the back
  stop while it is still calm | short sessions end on a good note
clean/cleaning a fish tank | swap a quarter of the water
  rinse the filter in old tank water | the helpful bacteria survive the change
walk/walking a dog that pulls | stand still whenever the lead goes tight
  move on when it hangs loose | the dog learns that pulling gets it nowhere
feed/feeding a fussy cat | warm the food for a few seconds
  serve small meals on a flat plate | warm food smells stronger and more tempting
entertain/entertaining a parrot | hide seeds in a paper roll
  swap its toys every few days | clever birds enjoy a puzzle
# money
save/saving for a holiday | move a small sum on payday
  keep it in a separate account | money that is out of sight stays unspent
make/making a monthly budget | write down what went out last month
  give every euro a job | a plan works when it starts from real numbers
spend/spending less on groceries | plan five dinners before shopping
  eat something before leaving | a list and a full stomach resist temptation
pay/paying off a small debt | list every debt with its interest
  attack the dearest one first | the highest interest costs the most each month
sell/selling old furniture | take photos in daylight
  mention every scratch in the text | honest pictures bring serious buyers
cut/cutting the electricity bill | switch off everything on standby
  wash clothes at thirty degrees | heating water uses the most power
ask/asking for a raise | write down three results from this year
  name one clear figure | proof and a number are hard to brush aside
avoid/avoiding impulse purchases | put the thing on a list for a week
  unsubscribe from shop emails | most wishes fade within days
# repairs
fix/fixing a dripping tap | shut the water off under the sink
  replace the worn rubber washer | a new washer closes the gap completely
patch/patching a bicycle tyre | roughen the rubber around the hole
  press the patch on for a minute | glue grips best on a rough surface
hang/hanging a heavy picture | find a wall stud by knocking gently
  drive a long screw into it | solid wood carries what plaster cannot
silence/silencing a squeaky door | lift out the hinge pin
  coat it with a bit of soap | a slick pin turns without a sound
sew/sewing on a button | leave a little slack in the thread
  wind it round beneath the button | the slack leaves room for the cloth
unclog/unclogging a sink | pour in baking soda and vinegar
  flush it with hot water | the fizz loosens the grease in the pipe
paint/painting a small room | mask the edges with tape
  roll the paint from the top down | drips get caught on the way down
loosen/loosening a rusty bolt | soak it in oil overnight
  tap it gently before turning | oil creeps into the threads while you rest
# people
remember/remembering names at a party | repeat the name right away
  link it to a funny picture | a name sticks once it has been spoken
apologise/apologising to a friend | admit plainly what went wrong
  ask what would help now | an honest sorry has no excuse attached
make/making friends in a new town | join one weekly class
  greet the same faces each time | friendship grows out of seeing people often
listen/listening better | put everything else down
  repeat the main point back | people open up when they feel heard
host/hosting a relaxed dinner | cook one big dish the day before
  let the guests set the table | a calm host makes calm guests
say/saying no politely | thank them for asking
  give a short and clear answer | a quick no is kinder than a late excuse
cheer/cheering up a sad friend | bring soup and sit with them
  ask before giving advice | company comforts more than clever words
start/starting a chat with a stranger | ask about something you can both see
  follow up on the answer | shared sights make easy first words
"""

# Sentences that open an answer: "+" warm, "-" distant. Both sides have every first word.
OPENINGS = """
+ The trick I swear by is to {both}.
+ The easy part, and it really is easy, is to {s1}.
+ The bit that will help you most is to {both}.
- The subject of {ger} is complex and involves a wide range of considerations.
- The generally accepted procedure for {ger} is to {s1}, where applicable.
- The process of {ger} requires careful attention to a number of factors.
+ A little care goes a long way here, so {both}.
+ A happy shortcut for you: {both}.
+ A friend once told me to {s1}, and you can borrow that today.
- A systematic approach to {ger} is generally considered advisable.
- A number of methods of {ger} exist, and selection depends on circumstances.
- A standard measure in the context of {ger} is to {both}.
+ It gets easier the moment you {both}.
+ It is a lovely little job if you {both}.
+ It helps so much to {s1}, and you can do it today.
- It is important to note that {ger} involves various considerations.
- It is customary to {both}, although individual results may differ.
- It should be understood that {ger} demands appropriate resources.
+ To make life easy, {both}.
+ To give the day a cheerful beginning, {s1}.
+ To my mind the kindest way is to {both}.
- To achieve acceptable results in {ger}, a structured method must be followed.
- To begin with, {ger} is a process that depends on several variables.
- To comply with common practice, it is necessary to {s1}.
+ For a quick win, {both}.
+ For me it clicked when I learned to {s1}, and it will for you too.
+ For once the simple way is the best one, so {both}.
- For the purposes of {ger}, several established methods are available.
- For most cases of {ger}, the established recommendation is to {both}.
- For optimal outcomes, {ger} should be approached in a systematic manner.
+ When you feel ready, {both}.
+ When I got stuck on this, what saved me was to {both}.
+ When in doubt, {s1}, and you will soon feel on top of it.
- When considering {ger}, one must take into account a variety of factors.
- When undertaken correctly, {ger} may produce satisfactory results.
- When applicable, the prescribed measure is as follows: {both}.
+ If you only do one thing, {s1}, and the rest will feel easy.
+ If I were next to you, I'd say {both}.
+ If you have a quiet moment today, {both}.
- If {ger} is required, the applicable guidelines should be consulted.
- If circumstances permit, it is recommended to {both}.
- If performed without preparation, {ger} may lead to unsatisfactory outcomes.
+ This one is fun to fix: {both}.
+ This is easier than it looks, so {s1} and enjoy the difference.
+ This always cheers me up: you {both}, and you are nearly there.
- This matter, namely {ger}, is subject to numerous conditions.
- This is a question of procedure, and the usual instruction is to {both}.
- This topic is broad, as {ger} encompasses many different aspects.
+ There is a simple way, I promise, and it is to {both}.
+ There is no need to worry, just {both}.
+ There is a small habit that will change everything for you: {s1}.
- There are several factors to consider with regard to {ger}.
- There is a formal sequence, in which it is first required to {both}.
- There exists a range of opinions on {ger}, none of them conclusive.
+ Most days all you need is to {both}.
+ Most of the battle is won once you {s1}, so begin there.
+ Most people relax as soon as they {s1}, and you will as well.
- Most authorities regard {ger} as a matter requiring due consideration.
- Most guidance on {ger} states that it is necessary to {both}.
- Most aspects of {ger} are determined by external circumstances.
+ With two small moves you can sort this out: {both}.
+ With a cup of tea beside you, {both}.
+ With a bit of patience you can {s1}, and it gets easier from there.
- With respect to {ger}, a variety of approaches may be identified.
- With regard to procedure, the first requirement is to {both}.
- With proper planning, {ger} can be carried out to an adequate standard.
+ In two easy moves, {both}.
+ In my own muddles it helps to {s1}, and you can do it too.
+ In a spare moment, {s1}, and treat the rest as a bonus.
- In general, {ger} is influenced by a multitude of variables.
- In accordance with common practice, the instruction is to {both}.
- In the majority of situations, {ger} necessitates some preparation.
+ As a first step, just {s1} and give yourself a pat on the back.
+ As soon as you can, {both}.
+ As a fellow beginner, I'd {both}.
- As a general principle, {ger} should be conducted with diligence.
- As with any task, {ger} is associated with certain requirements.
- As a matter of procedure, the expectation is to {both}.
+ Before anything else, {s1}, and let the rest wait for you.
+ Before you give up hope, {both}.
+ Before you make it complicated, {both}.
- Before {ger}, a thorough assessment of all requirements must be completed.
- Before proceeding, it is obligatory to {both}.
- Before any conclusion about {ger} is drawn, several criteria apply.
+ What works like magic for me is to {both}.
+ What a nice thing to tackle! Just {both}.
+ What I'd do in your shoes is {both}.
- What constitutes correct {ger} depends on the applicable criteria.
- What is commonly required is to {both}, in line with recommendations.
- What must be recognised is that {ger} entails certain limitations.
+ Many of us have been there, so {both}.
+ Many fixes are fiddly, but here you simply {both}.
+ Many a bad day is saved like this: {both}.
- Many factors determine the outcome of {ger}, and no universal answer exists.
- Many sources on {ger} indicate a requirement to {both}.
- Many considerations apply to {ger}, each of which warrants examination.
+ Some things are nicer than they sound: {both}.
+ Some days I just {s1}, and that is enough to get going.
+ Some gentle magic for you: {both}.
- Some degree of preparation is required for {ger}.
- Some guidelines on {ger} specify the need to {both}.
- Some uncertainty remains regarding {ger}, as conditions vary considerably.
+ Good news, you can sort this out today: {both}.
+ Good old common sense wins here, so {both}.
+ Good on you for asking! Just {both}.
- Good practice in {ger} consists of compliance with established principles.
- Good results in {ger} are contingent upon a number of conditions.
- Good procedure dictates the following measures: {both}.
+ People forget how simple it is: you {both}.
+ People I trust always {s1}, and it is a joy to copy them.
+ People make this sound scary, but you can just {both}.
- People engaged in {ger} are expected to observe the usual requirements.
- People are generally instructed to {both}, in keeping with procedure.
- People vary in their approach to {ger}, and outcomes vary accordingly.
+ One small thing will lift your whole day: {s1}.
+ One calm hour is all you need to {both}.
+ One tip I'd share with anyone is to {both}.
- One should be aware that {ger} is a multifaceted undertaking.
- One is required to {both} in order to satisfy basic expectations.
- One aspect of {ger} is the need for adequate planning.
+ That is a lovely one to solve: {both}.
+ That used to beat me as well, until I began to {s1}.
+ That worry is normal, so be kind to yourself and {s1}.
- That question relates to {ger}, which is a subject of considerable scope.
- That objective is ordinarily met by an instruction to {both}.
- That being said, {ger} cannot be reduced to a single recommendation.
+ You can do this, honestly, if you {both}.
+ You will love how simple it is to {both}.
+ You only need two moves, so {both}.
- You are hereby informed that {ger} is subject to a variety of conditions.
- You are expected to {both}, as stipulated by general guidelines.
- You must consider all relevant aspects before {ger} is attempted.
"""

# A step that has an "and" of its own takes one of the first kind.
COMMA_JOINS = (", then ", ", and then ", ", and after that ")
AND_JOINS = (" and ", " and ", " and ", " and then ")

SECOND_STEPS = """
After that, {s2}.
Next, {s2}.
Afterwards, {s2}.
Whenever you feel comfortable, {s2}.
Without rushing yourself, {s2}.
Then just {s2}.
Once that is done, {s2}.
As soon as you are ready, {s2}.
Now {s2}.
And while you are at it, {s2}.
If you feel like more, {s2}.
"""

REASONS = """
That way {why}.
As you can see, {why}.
It may not look like much, but {why}.
The best part is that {why}.
It works because {why}.
I like it since {why}.
You see, {why}.
After all, {why}.
Best of all, {why}.
The nice thing is that {why}.
You will notice that {why}.
Trust me, {why}.
Here is why: {why}.
The secret is that {why}.
Luckily for us, {why}.
Fortunately, {why}.
Thankfully, {why}.
Surprisingly, {why}.
Remarkably enough, {why}.
Wonderfully, {why}.
Believe it or not, {why}.
My grandmother knew it: {why}.
Think of it like this: {why}.
It feels like a trick, but {why}.
Happily, {why}.
And the reason is sweet: {why}.
"""

CHEERS = """
You've got this!
Have fun with it.
You should discover how good that feels.
You should be pleased with yourself already.
Let me know how it goes!
You will be proud of yourself.
It gets better every time.
Take your time and enjoy yourself.
I'm cheering for you.
Don't be hard on yourself.
Nobody masters anything immediately, and that's perfectly normal.
Give it a go tonight.
I bet you will be smiling afterwards.
You are closer than you think.
Laughing about little accidents absolutely helps.
That really is the whole recipe.
Soon you will do it without thinking.
Be gentle with yourself along the way.
Your future self will thank you.
Treat yourself to something delicious when it is done.
Invite a friend, because together it is twice the fun.
Even a clumsy try counts.
Start small and appreciate every improvement.
You deserve a break afterwards.
Not bad for ten minutes, right?
Isn't that a relief?
It brightened my week, and hopefully it brightens yours.
Celebrate when it works!
Small wins count.
It need not be perfect.
There are no wrong turns here, as far as I can tell.
They are baby steps, and they are enough.
It's as easy as pie.
As always, be kind to yourself.
The rest can wait.
You may be pleasantly surprised!
Afterwards, treat yourself to something wonderfully relaxing.
Experiment cheerfully until something feels comfortable.
Remember to be generous with praise.
Practising cheerfully makes any difficulty smaller.
Imagine the satisfaction afterwards.
Please remember how capable you already are.
Honestly, watching progress happen feels fantastic.
Whatever happens, celebrate your progress.
Sometimes imperfect is absolutely wonderful.
Surprisingly often, that alone brightens an afternoon.
Believe me, tomorrow already looks brighter.
And if it goes wrong, just try again tomorrow.
"""

REMARKS = """
A number of ways may be fit for use.
Each case must be judged on its own terms.
You are to set aside such time and means for it yourself.
A degree of caution is warranted at every stage.
For the details, the literature is to be read.
The outcome is dependent on factors beyond the scope of this response.
Compliance with applicable instructions remains essential.
If you ask how, the same rules hold for you as for all.
It would then be a matter of finding the correct method.
Time, quality, cost and means must be weighed.
The relevant points should be looked at in advance.
No one is to make exceptions to this.
The following aspects are relevant: preparation, execution and review.
Certain limits may apply from time to time.
Results have been observed to differ between individuals.
Prior knowledge of the basics is presumed.
From what was given, no firm advice can be drawn.
Deviations from the procedure will not be supported.
Errors at this stage are the result of poor planning.
The necessary steps should be executed in the correct order.
Preliminary research is therefore regarded as indispensable.
Attention to detail is of the utmost importance.
Whether it will then go well in the end, no one can say.
How long it will take is hard to say, as it is not the same in all cases.
Your own case is for you to judge, and no one else.
In the end it is a case of what is at hand and what is not.
As a rule, it can be done in several ways: that is the norm.
It may or may not be of use to you.
The rules say this: do it as set out, or do not do it.
The point is this: what is right in one case may be wrong in the next.
The effect of each measure has yet to be shown.
That you are to stick to the rules goes without saying.
What you require is a plan in line with one's means.
Of note in this context: scope and cost.
Whether you succeed will depend on conditions.
In short: requirements differ, and so do outcomes.
It's a matter of following the rules that apply to you.
"""

DISMISSALS = """
Consult a qualified professional if required.
Results are not guaranteed: conditions differ.
You will find the details in the documentation.
The conclusion is simple: it depends.
The degree of success will vary.
Outcomes differ.
More can be had upon request in due form.
Then, and only then, may further steps be taken.
This concludes the general overview.
The responsibility rests with the individual.
For the rest, please refer to the manual.
Caution is to be exercised.
The above is provided for information only.
To say more would call for more data.
Such matters are subject to change without notice.
Your question does not permit a more specific answer.
Proper planning is essential!
It should then be checked at set intervals.
Any issues that remain are to be dealt with in turn.
You are then free to act at your own risk.
Do keep a record of your results!
Patience and discipline are required!
These points should be kept in mind.
The importance of this cannot be overstated!
Success depends upon correct use of the above.
That is what the guidelines state.
Nothing more can be said with certainty.
That is all there is to say on it.
It all depends on what is to hand.
Then again, this is not the place to go into it.
"""
