# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""The judge of answers. Run with: python -m pytest tests/test_answers.py"""
import doctest
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as answers
from eval import extract_answer, grade, is_equiv, opened_thought, reward, visible

# Labelled pairs, one a line: gold <- response. A line break inside one is written as ⏎
EQUAL = r"""
A) -1 m/s^2 <- A) -1 m/s^2
A) 4-6 <- A) 4 - 6
A) 4-6 <- 4–6
# options whose text has brackets or a reason of its own
B) neon (Ne) <- (B) neon (Ne)
B) neon (Ne) <- The answer is B) neon (Ne).
A) warm because it moves <- A) warm because it moves
C) time since then <- C. time since then
D) then rest <- then rest
# plus or minus
\{1\pm\sqrt{5},-2\} <- -2, 1\pm\sqrt5
3 \pm 2\sqrt2 <- 3 ± \sqrt8
# numbers
42 <- 42.0
42 <- +42
42 <- 042
1250 <- 1,250
1250 <- 1{,}250
371,\!043 <- 371043
1/2 <- .5
30000 <- 3e4
30000 <- 3 \times 10^{4}
1500 <- 1.5 x 10^3
0.0021 <- 2.1 \times 10^{-3}
2^2005 <- 2^{2005}
12 <- １２
-7 <- −7
0.5 <- ½
3 <- ٣
5/2 <- 2½
1/6 <- ⅙
7/8 <- ⅞
x^{10} <- x¹⁰
10^{-3} <- 10⁻³
# exactness
1/3 <- 0.333333333333
2/3 <- 0.666666666667
\sqrt{17} <- 4.123105625617661
0 <- \sin\pi
1 <- \tan 45^\circ
1/2 <- \sin 30^\circ
3 <- \sqrt{9}
2/3 <- \sqrt{4/9}
# repeating decimals
1/6 <- 0.1\overline{6}
8/11 <- 0.\overline{72}
1 <- 0.\overline{9}
7/6 <- 1.1\overline{6}
0.\overline{142857} <- \frac17
# fractions, mixed numbers, roots
\dfrac32 <- \frac{6}{4}
-\frac{3}{4} <- (-3)/(4)
7/3 <- 2\frac{1}{3}
7/3 <- 2 1/3
10/3 <- 2\frac53
1/2 <- 3\frac12 / 7
0.1 <- \frac1{10}
2\sqrt3 <- \sqrt{12}
\frac{\sqrt{2}}{2} <- \frac{1}{\sqrt2}
5\sqrt2 <- 5√2
# expressions
a^2-b^2 <- (a+b)(a-b)
3x^2 <- 3*x**2
1 <- \sin^2 t + \cos^2 t
x+1 <- \frac{x^2-1}{x-1}
\sec x <- \frac1{\cos x}
ab <- ba
xyz <- zyx
R^2-r^2 <- (R-r)(R+r)
\pi r^2 <- r^2\pi
# tuples, intervals, sets, lists
(1,2) <- (1, 2)
(3,\infty) <- (3,+\infty)
(0,1)\cup(4,6) <- (4,6)\cup(0,1)
1,2,3 <- 3, 1, 2
\{1,2\} <- 2 \text{ and } 1
100, 200 <- 100,200
\begin{bmatrix}1&2\\3&4\\\end{bmatrix} <- \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{pmatrix}1&2\\[4pt]3&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{pmatrix}1\\[0.5em] 2\end{pmatrix}
(1,2) <- \begin{pmatrix} 1 \\ 2 \end{pmatrix}
[-2,7] <- x \in [-2,7]
# repeats, and values of names
7 <- \boxed7, \boxed7
4 <- \boxed{4} and \boxed{4}
(5,2),(7,2) <- p=5,q=2; p=7,q=2
(1,2) <- x=1, y=2
(1,2) <- y=2, x=1
-3,3 <- x=-3 or x=3
2,5 <- x=2, x=5
\{2,5\} <- x=2 or x=5
# equations and inequalities
5 <- x = 5
x=5 <- 5 = x
x=5 <- 5
y = 1.5 - x/2 <- 2x + 4y = 6
(2,\infty) <- x > 2
x > 2 <- 2 < x
x < 1 <- -x > -1
(0,1] <- 0 < x \le 1
x+1 <- f(x) = x+1
x \neq 5 <- x != 5
# shown arithmetic
5 <- 2 + 3 = 5
18 <- 9 × 2 = $18
1/3 <- x=\frac13\approx0.33
42 <- p + q = 30 + 12 = 42
5 <- \text{Area} = 5
5 <- Area = 5
12 <- x = 3 \cdot 4 = 12
7 <- n = 10 - 3 = 7
0.33 <- x \approx 0.33
\frac{\pi}{4} <- \frac{\pi}{4} \approx 0.785
# units, money, percentages, degrees, bases
12 <- 12 apples
12 <- 12\text{ cm}^2
12 in <- 12 inches
\$3.5 <- $3.50
\$20 <- 20 dollars
-45 <- -$45
25\% <- 25%
25% <- 25 percent
90 <- 90^\circ
90 degrees <- 90^{\circ}
1011_{2} <- 1011_2
101_2 <- (101)_2
101_2 <- (101)_{2}
5am <- 5 am
# scale words
5000 <- 5 thousand
5,000,000 <- 5 million
\$2,000,000 <- $2 million
24 <- 2 dozen eggs
1500 <- 1.5 thousand
3,200,000,000 <- 3.2 billion people
# ratios and times
2:3 <- 4:6
1:2:3 <- 2:4:6
3:20 <- 3:20
11:21 <- V_1:V_2 = 11:21
# text
tuesday <- \text{Tuesday}
\text{VW} <- vw
an old mill <- An old mill
even <- Even
no <- No
R^2 - r^2 <- $R^2 - r^2$
5 \pmod{12} <- 5\pmod{12}
# options
B) a ferry <- B
B) a ferry <- (b)
B) a ferry <- B. a ferry
B) a ferry <- a ferry
B) a ferry <- B: A ferry
B) a ferry <- B - a ferry
B) a ferry <- Option B
B <- Option B
B <- B. a lake
B) 12 <- 12.0
B) 12 cm <- 12
C) a magnet <- C because A is wood
C) a magnet <- C, since iron sticks to it
C) a magnet <- C (a magnet)
C) a magnet <- C, a magnet.
C) a magnet <- [C]
C) a magnet <- \boxed{\text{C}}
C) a magnet <- The answer is C, not A.
C) a magnet <- Final Answer: C is correct
C) a magnet <- **C) a magnet**
E) E = mc^2 <- E = mc^2
B) H, He and Li <- H, He and Li
# markers
4 <- Half of 8 is 4.⏎⏎Final Answer: 4
4 <- Final Answer: 3⏎No, again.⏎Final Answer: 4
C <- ### Final Answer⏎C
42 <- Final Answer： 42
C <- <think>hm</think><answer>C</answer>
9 <- \fbox{9}
B <- 答案：B
B <- 答案是 B。
7 <- The final answer is **7**
7 <- Final answer⏎⏎7
7 <- Final Answer: The sum is:⏎⏎7
8 <- 5. **Final Answer:**⏎   - The number of pieces is:⏎     \[⏎     \boxed{8}⏎     \]
60 <- Final Answer:⏎   - Ben started with $60.
7 <- Final Answer: \[⏎7⏎\]
30 <- Each tray holds \boxed{5} eggs. So the answer is 30.
30 <- Each tray holds \boxed{5} eggs.⏎⏎#### 30
5 <- We test. \boxed{5}⏎This shows that our answer is correct.
7 <- <think>perhaps \boxed{5}</think> The answer is 7.
7 <- perhaps 5</think>7
7 <- <think>The answer is 7.
5 <- \boxed{5\,}
3, 5 <- Either \boxed{3} or \boxed{5} will do.
5 <- The answer is \boxed5
# sentences
18 <- She has **18** eggs left
70 <- So he kept **$70** in all.
18 <- Final Answer: Ann has 18 eggs left after 7 days.
-45 <- Final Answer: The account stands at -$45.
3/2 <- a total of 1 1/2 miles
5\sqrt2 <- side is 5√2 cm long
3/7 <- chance of it is \frac37
-1/2 <- we got -½ in the end
8 <- In the end there are 8 of them.
-0.5 <- Hence the slope of that line is $-\frac{1}{2}$ here.
x > 5 <- Therefore $x \gt 5$ is the solution.
34 <- Final Answer: The largest $n$ is 34.
5000 <- Final Answer: The town has 5 thousand people.
18 <- She has 18 eggs (6 in each of 3 boxes).
(1,2) <- The lines meet at (1, 2) only.
12 cm <- The length is 12 cm.
7 <- Of 10 boys 3 left, so there are 7.
# all kinds once more
0.\overline{3} <- 1/3
0.\overline{36} <- \frac{4}{11}
2.\overline{7} <- 25/9
0.58\overline{3} <- 7/12
0.\bar{6} <- 2/3
18 <- 3 + 15 = 18
18 <- 3 × 6 = 18 apples
12 <- x + y = 5 + 7 = 12
7 <- The total is 3 + 4 = 7.
7 <- 14/2 = 7
2/3 <- \frac{4}{6} = \frac{2}{3}
0.75 <- \frac{3}{4} = 0.75
36 <- \text{Area} = 6 \times 6 = 36
36 <- Total cost = 36 dollars
3.14 <- x = 3.14
B) copper <- B, because copper conducts.
B) copper <- (B) copper
B) copper <- B) copper, since it conducts
B) copper <- **B**
B) copper <- **B) copper**
B) copper <- The answer is: B
B) copper <- Answer: (B)
B) copper <- The correct answer is option B.
B) copper <- The best choice is B) copper
B) copper <- [B] copper
B) copper <- B as it conducts
B) copper <- \boxed{B}
B) copper <- $\boxed{\text{B) copper}}$
B) copper <- copper
B) copper <- Copper.
B) copper <- the answer is copper
B) copper <- Final Answer: b
B) copper <- Final Answer:B
B) copper <- FINAL ANSWER: B
B) copper <- Final Answer - B
B) copper <- **Final Answer:** B
B) copper <- ## Final Answer⏎⏎**B**
B) copper <- <answer>B</answer>
B) copper <- <answer> B) copper </answer>
B) copper <- 最终答案：B
42 <- 答案为42
42 <- 答案是：42
42 <- \fbox{42}
42 <- $\fbox{$42$}$
42 <- Answer： 42
42 <- ANSWER: 42
42 <- The answer is **42**.
42 <- The answer is $42$.
42 <- So the answer is \(42\).
42 <- Final Answer: **42**
42 <- Final Answer: 42.
42 <- **42**
42 <- It costs **$42** in total.
42 <- So **42** eggs remain.
42 <- They picked **42 apples** today.
1/8 <- ⅛
3/5 <- ⅗
11/4 <- 2¾
x^{12}+1 <- x¹²+1
a^{-2} <- a⁻²
2300 <- 2.3 x 10^3
2300 <- 2.3×10³
2300 <- 2.3 \cdot 10^3
0.00042 <- 4.2 × 10^{-4}
7 <- \boxed{7\;}
7 <- \boxed{7~}
7 <- \boxed{\,7\,}
7 <- \boxed{7\ }
\begin{pmatrix}5\\6\end{pmatrix} <- \begin{pmatrix}5\\[6pt]6\end{pmatrix}
\begin{pmatrix}5\\6\end{pmatrix} <- \begin{bmatrix}5\\[1ex]6\end{bmatrix}
1101_2 <- (1101)_{2}
3A_{16} <- (3A)_{16}
8 <- \boxed{8} or \boxed{8}
(1,2),(3,4) <- x=1, y=2; x=3, y=4
(1,2),(3,4) <- x=3,y=4; x=1,y=2
-2,2 <- x = 2, x = -2
10^6 <- 1 million
7000 <- 7 thousand
\$3,000 <- 3 thousand dollars
2500000 <- 2.5 million
3:4 <- 6:8
2:1 <- 4:2
5\sqrt{3} <- The area is 5√3.
\frac{\pi}{4} <- The angle is π/4 radians
-8 <- The balance is -$8.
-8 <- The temperature is −8 degrees.
5/4 <- They ate a total of 1 1/4 pizzas.
3/8 <- The probability is \frac{3}{8}.
3/8 <- The probability is 3/8.
0.375 <- The probability equals $\frac38$.
12 <- He has 12 marbles left after 3 days
12 <- There are 12 of them
12 <- She needs 12 in total
12 <- He paid $12 for it
20 <- The speed is 20 miles per hour
5 <- After 3 hours, she has 5 left.
150 <- The train covers 150 miles in 3 hours
6 <- The answer is 6 because 2 times 3 is 6.
6 <- <think>5? \boxed{5}</think>\boxed{6}
6 <- <think>The answer is 5</think>⏎⏎The answer is 6.
6 <- First \boxed{5}, then the answer is 6.
6 <- \boxed{5} is wrong. Final Answer: 6
ab <- b a
2ab <- 2ba
(2,\frac{7}{2}) <- (2, 3.5)
y=3x-1 <- 3x - y = 1
x\le 3 <- 3 \ge x
(-\infty,3] <- x \le 3
1 \frac{1}{2} <- 1.5
2\frac{1}{10} <- 2.1
-1\frac12 <- -1.5
10:30 <- 10:30
10:30 am <- 10:30 am
16 <- Janet sells 9 eggs at $2 each, so she makes 9 * 2 = $18. Final Answer: 16
540 <- He runs 3*3=9 sprints a week⏎So he runs 9*60=540 meters⏎#### 540
540 <- The answer is 540 meters.
5 <- Therefore, x = 5.
5 <- So, the value of x is 5.
5 <- Thus x equals 5
2x+3 <- The equation of the line is y = 2x + 3.
y=2x+3 <- The equation of the line is $y = 2x + 3$.
\frac{1}{2} <- The value is 1/2.
12\pi <- The area is 12π.
12\pi <- The area is $12\pi$ square units.
12\pi <- \boxed{12\pi\text{ square units}}
6 <- $6$
6 <- \(6\)
6 <- \[6\]
6 <- $$6$$
6 <- \boxed{\$6}
6 <- \boxed{6\text{ dollars}}
6 <- \boxed{6.00}
6 <- \$6.00
6 <- 6 USD
6 <- 6 kilometers
6 <- 6kg
6 <- 6 kg
6 <- 6cm
6 <- 6 hours
6 <- 6 hrs
6 <- 6%
6 <- x=6
6 <- x = 6 cm
6 <- n=6.
\text{Monday} <- Monday
\text{Monday} <- The answer is Monday.
\text{Monday} <- \boxed{\text{Monday}}
yes <- Yes
yes <- Yes.
True <- true
3, 5, 7 <- 3, 5, and 7
3, 5, 7 <- {3, 5, 7}
3, 5, 7 <- 7, 5, 3
3,5,7 <- x=3, x=5, x=7
(3, 5) <- (x, y) = (3, 5)
(3, 5) <- x = 3, y = 5
(3,5) <- x=3 and y=5
(3,5) <- \left(3, 5\right)
(3,5) <- (3,5).
(3,5) <- The point is (3, 5).
\frac{3}{5} <- 0.6
\frac35 <- 3/5
-\frac35 <- \frac{-3}{5}
-\frac35 <- \frac{3}{-5}
\sqrt{2} <- 2^{1/2}
\sqrt{2} <- \sqrt2
\sqrt[3]{2} <- 2^{1/3}
1+\sqrt{3} <- \sqrt{3}+1
\frac{1+\sqrt{5}}{2} <- \frac12 + \frac{\sqrt5}{2}
x^2+2x+1 <- (x+1)^2
\frac{x}{x+1} <- 1-\frac{1}{x+1}
e^{2x} <- (e^x)^2
\ln 6 <- \ln 2+\ln 3
(-\infty, 2) <- x<2
[1,3] <- 1\le x\le 3
\{1,2,3\} <- 1,2,3
10,000 <- 10000
10,000 <- 10{,}000
10000 <- 10^4
1,234,567 <- 1234567
0.5 <- .50
5\% <- 5
-2 <- - 2
-2 <- −2
2 <- +2
A <- A
A <- (A)
A <- A.
A <- A)
A <- \textbf{(A)}
A <- \text{(A)}
A <- The answer is (A).
A <- The answer is A) something
A <- The correct option is (A).
A <- Option (A)
A <- a
C <- The answer is: C.
D <- **Answer:** D
D <- **Answer: D**
D <- Answer: **D**
D <- The answer is **D**
D <- The answer is **D) a dog**.
D) a dog <- The answer is **D) a dog**.
D) a dog <- The answer is D) a dog, because it barks.
D) a dog <- D) A dog
D) a dog <- D) a dog.
D) a dog <- d) a dog
D) a dog <- Final Answer: D) a dog⏎
D) a dog <- Final Answer: \boxed{D}
D) a dog <- Final Answer: (D) a dog
D) a dog <- Final Answer: "D"
D) a dog <- Final Answer: D (a dog)
D) a dog <- Final Answer: a dog
D) 5.0 <- 5
D) $5 <- $5
D) 3/4 <- 0.75
D) the number of protons <- The number of protons
D) CO2 <- CO2
D) Mount St. Helens <- Mount St. Helens
D) it is hot. <- it is hot
D) 1,000 kg <- 1000 kg
1000 <- 1 000
1000 <- 1\,000
# several values in a sentence, and a reason after one
2, 3 <- The roots are 2 and 3.
2, 3 <- The solutions are $x=2$ and $x=3$.
7 <- The answer is exactly 7.
7 <- It's 7.
7 <- The answer is 7, as shown above.
7 <- The answer is 7 (see above).
18 <- Final Answer: 18 (eighteen)
B) a ferry <- B is the right choice
B) a ferry <- B is the answer
\$50 <- 50 dollars
\$50 <- 50
50 <- \$50
2 hours and 30 minutes <- 2 hours, 30 minutes
x=2, y=5 <- y=5, x=2
(2,5) <- (x,y)=(2,5)
(-\infty,\infty) <- (-\infty, +\infty)
# what stands beside a statement
7 <- It is not 5, so the answer is 7.
7 <- So it cannot be 8, but the answer is 7.
7 <- Final Answer: 7. I checked it.
15 <- \boxed{15} apples are left.
20\% <- or \boxed{20} percent.
12 cm^2 <- The area is 12 cm^2.
7 <- The answer to the question is 7.
7 <- The answer must be 7.
7 <- $3 + 4 = \boxed{7}$ students who did no homework.
108 <- $6(18^\circ)=\boxed{108}^\circ$
1 <- $5\cdot 5 \equiv \boxed{1}\pmod 6.$
55 <- so $2x = 110$ or $x=\boxed{55}$.
54 <- Jojo scored 54 points.
B) a ferry <- The answer is **B**: a ferry.
B) a ferry <- Final Answer: B — a ferry
12 miles per hour <- 12 miles/hour
# words that only look like parts or numbers
5 <- 5 months
5 <- Final Answer: 5 months
5 <- It takes 5 months.
5 <- 5 paths
5 <- 5 family members
5 <- 5 empty bottles
5 <- 5 party hats
5 months <- 5 month
5 <- 5 sec
5 seconds <- 5 sec
30 sec <- Final Answer: 30 sec
\sec x <- \frac{1}{\cos x}
# commas between digits: of thousands, or of a list
(1,200) <- (1, 200)
(100,200) <- (\frac{200}{2},200)
[1,200] <- [1, \frac{400}{2}]
\{1,200\} <- \{200,1\}
1,2,300 <- 300, 2, 1
1,200,300 <- 1200300
(1,200+x) <- (1, x+200)
1500 <- (1,200 + 300) = 1500
1200 <- (1200)
# products of letters, and words
xy <- yx
abc <- cba
uvw <- wvu
constant <- Constant
CO2 <- CO2
A) constant <- constant
B) rat <- Rat
# words of the end, of units and of the announcement
27 <- Final Answer: Ella is 27 years old.
22 <- Liam is 22 years old now.
4 <- Final Answer: 4 buses are needed.
3000 <- The factory produces 3,000 toys
22 <- The class raised $22.
200 <- 200 mL
30 <- The speed is $30\,\mathrm{km/h}$.
30\mathrm{km/h} <- 30 km/h
20 <- It travels at 20 km/h
B) a ferry <- The most logical answer is: B) a ferry
B) a ferry <- The most likely answer is B.
2000 <- The largest four-digit such number is \(\boxed{2000}\).
# an explanation in brackets
B) carbon dioxide <- B) carbon dioxide (CO2)
B) a ferry <- Final Answer: B) a ferry (the boat that crosses a river).
# the name on the right
x=1/2 <- 0.5=x
# words before the verb of a box
25 <- The last two digits are $\boxed{25}$.
4 <- Twice the side is therefore $\boxed{4}$.
3 <- The least number that is not a factor equals \boxed{3}.
-2 <- So the largest negative root must be $\boxed{-2}$.
0.41 <- $\sqrt2-1\approx\boxed{0.41}$
# what follows supports a statement
6 <- Final Answer: 6⏎⏎Check: 6 / 2 = 3, as given.
6 <- $n=\boxed{6}$.⏎⏎Alternatively, we could have used a table.
6 <- The answer is $\boxed{6}$. Note that 9 is not a root.
6 <- $\boxed{6}$ (not $9$).
6 <- Final Answer: 6. No rounding is needed.
6 <- The answer is 6.⏎⏎So she has 6 apples.
# words after a box, and units that only look like numbers
6 <- He ate $\boxed{6}$ quarters.
6 <- $\boxed{6}$ times.
7 <- Final Answer: 7 parties
7 <- Final Answer: 7 properties
# thoughts in other tags
8 <- <reasoning>\boxed{7}</reasoning>\boxed{8}
8 <- <|channel|>analysis<|message|>It is 7.<|end|><|start|>assistant<|channel|>final<|message|>It is 8.
5 <- $\boxed{5}$ months
# subjects that are names, numbers and values
7 <- So the value of 2x is 7.
7 <- So f(2) is 7.
9 <- Hence 4 + 5 is 9.
12 <- Then 6 times 2 is 12.
7 <- So $x_1$ is 7.
# further forms of an answer, a reason, a unit
42 <- The required answer is 42.
42 <- The answer should be 42.
42 <- The answer comes out to 42.
B) a ferry <- So I would choose B) a ferry.
42 <- Final Answer (in dollars): 42
1,3 <- $x=1$ and $x=3$ are the only solutions.
B) a ferry <- B) a ferry, which crosses the river.
42 <- Final Answer: 42 ✅
1 <- 1 apple
1 <- Final Answer: 1 student
5 <- 5 cups of flour
60 <- 60 square feet of carpet
60 <- $60 per month
(1,2,3) <- \langle 1,2,3\rangle
\emptyset <- \varnothing
42 <- Total: 42
42 <- Therefore: 42 apples
42 <- **Solution:** 42
42 <- The expression simplifies to 42.
5 <- 5 sheep
6 <- If a root exists, then $x$ equals $\boxed{6}$.
6 <- So the number of words without a vowel is $\boxed{6}$.
45 <- So $\angle A$ is 45.
6 <- He has $\boxed{6}$ more than Tom.
6 <- The answer is 6.⏎⏎Final check: 2 + 4 = 6
# any verb, what stands between it and the value, and a circumstance at the end
24 <- Final Answer: Omar baked 24 cookies.
150 <- Final Answer: The train travels 150 miles.
48 <- Final Answer: The farmer will plant 48 trees.
60 <- Final Answer: Kim has to read 60 pages.
27 <- Final Answer: There are 27 students in the class.
120 <- Final Answer: The shop made $120 on Friday.
30 <- Final Answer: Ben and Kim have 30 cards together.
260 <- Final Answer: Ann and Tom have together 260 sheep.
-20 <- The account is at -$20.
23 <- If two are left out, he has 25 - 2 = 23 jewels.
# an announced sentence with one number
70000 <- Final Answer: Josh made a profit of $70,000.
680 <- Final Answer: Donald will pay for the laptop $680.
540 <- Final Answer: James runs 540 total meters a week
160 <- Final Answer: It takes Carla 160 minutes to download the file.
18 <- Final Answer: Janet makes $18 at the market.
24 <- Final Answer: The church has 24 more children than adults
40 <- Final Answer: The coffee will last Angie 40 days
84 <- Final Answer: The hens laid 7 dozen eggs
18 <- The answer is: Ann **bought 18 eggs** today.
# units of one letter, other coins, and what is done each hour or week
8 <- 8 m
8 <- 8 m^2
8 <- 8\text{ m}
8 <- 8 m/s
8 <- 8 g
8 <- 8 L
8 L <- 8 liters
8 <- 8 °C
8 <- 8 mph
8 <- €8.00
8 <- £8
8 <- 8 €
35 <- 35 hours a week
35 <- Final Answer: Nina works 35 hours a week.
30 <- Final Answer: It takes him 30 minutes.
60 miles per hour <- 60 miles an hour
"""

DIFFERENT = r"""
7 <- Final Answer: 7. My bad. 28.
7 <- \boxed{7}\,\%
A) 4-6 <- 7-9
B) 10-12 <- B) 7-9
2 <- 9-7
# words apart, and a label before a formula
B) bee hive <- beehive
A) CO_{2} <- (C) O_{2}
A) warm because it moves <- A) warm because it burns
# products
\frac12 <- \frac 121
1/2 <- \frac{1}{2}1
1 \pm 2 <- 2 \pm 1
1\pm\sqrt5 <- 1+\sqrt5
\pm 2 <- 2
# functions
2\ln x <- \ln 2x
2 ln x <- ln 2x
2 csc x <- csc 2x
2\sin x <- \sin 2x
x\sin 2 <- \sin 2x
\sin x <- \cos x
\log x <- \ln x
max x <- xma x
# numbers
42 <- -42
1250 <- 1.250
5 <- .5
2^2004 <- 2^{2005}
100000 <- 1e4
x^{10} <- x^1
1/6 <- 1/5
5/2 <- 21/2
1200 <- 1, 200
3 <- 3 4
# exactness
1000000000000001 <- 10^{15}
1/3 <- 0.33
1/3 <- 0.3333333333
1 <- 0.999999999999
0 <- 1/2^{50}
1-7/2^{60} <- 1
0 <- e^{-40}
0 <- 10^{-30}\pi
1/3^{40} <- 1/3^{41}
1+10^{-20} <- 1
10^{20}+\sqrt2 <- 10^{20}+\sqrt3
10^{20} <- 10^{20}+\pi
x <- x+10^{-20}
x^2 <- x^2(1+1/2^{60})
3.14159 <- \pi
\pi <- \frac{355}{113}
\sqrt2 <- 1.41421356
10^{-20}x <- 0
5 <- 5+2^{-60}
1/7 <- 0.142857
# an equation without a letter
y=2x+3 <- \tan 45^\circ=1
x=5 <- \sin\pi=0
2+3=6 <- 1+1=9
x=5 <- 1=1
3x-y=4 <- 10^{-20}x = 0
x<5 <- 1<2
x=5 <- x=x
y=x <- x-x=0
2+3=5 <- 1+1=2
7 <- 2+3=6
6 <- 2+3=6
x > 2 <- 3 > 2
x=5 <- 2+3=5
x=3 <- x-x+1=2
# unknown commands
0.\overline{72} <- 0.\overline{27}
0.\overline{72} <- 0
0.\overline{72} <- 0.72
0.1\overline{6} <- 0.\overline{16}
5\pmod{12} <- 12\pmod5
5 <- 5 \pmod{12}
3\oplus5 <- 5\oplus3
\vec{ab} <- \vec{ba}
0 <- 0.(3)
0.333... <- 0
\lfloor x \rfloor <- x
(0,1)\cap(4,6) <- (4,6)\cup(0,1)
A\cup B <- A\cap B
7 <- 7\ldots 9
# case
R^2-r^2 <- r^2-R^2
r/R <- R/r
V <- v
Rr <- rr
\Delta <- \delta
Aa <- AA
Ab+a <- ab+a
x <- X
N=2n <- n=2N
# labels
1 <- 1. Add 3 and 4 to get 7.⏎2. Double it: 14.
1 <- 1) 14
5 <- 5 : 6
5 <- 5) 17
2 <- 2. a lake
3 <- 3: 4
A) heat <- A) heat or C) light
A) heat <- A. Let me look at each. B melts. D stays.
A <- A. B. C. D.
A) heat <- A, B
A) heat <- A and C
A) heat <- A/C
A) heat <- not A
A) heat <- A?
A) heat <- A) light
B) a ferry <- A) a ferry
B) a ferry <- a tram
B) a ferry <- A ferry comes
C <- B) 12
A) tram <- a ferry
A <- Final Answer: A. Or is it B?
A) heat <- Either A or B
A) heat <- A) heat; B) light
B <- Bananas
C <- I cannot tell, C or D
# denied and hedged
7 <- it is not 7
7 <- it lies between 6 and 7
7 <- The answer isn't 7.
7 <- The answer is not 7.
7 <- there are fewer than 7 left
7 <- there are at least 7
7 <- it cannot be 7
7 <- It is either 6 or 7
7 <- Is it 7?
7 <- Perhaps it is 7
7 <- it would be 7 if he stayed
7 <- it is wrong to say 7
7 <- more than 7 remain
7 <- it is about 7
7 <- It is 7 is wrong
7 <- The answer is 7 or 8
7 <- 7 or more
7 <- up to 7 of them
7 <- it is never 7
7 <- nearly 7 miles
7 <- I doubt that it is 7
# cut out
45 <- stands at -$45
1/2 <- a total of 1 1/2 miles
7 <- chance of it is \frac37
2 <- side is 5√2 cm long
7 <- Ann has 18 eggs left after 7 days.
7 <- The ratio of them is 3:7
3 <- The chance of it is 3 out of 7
1 <- It happens 1 in 5 times
1 <- It takes a total of 1 1/2 hours
7 <- She is 7 and a half years old
5 <- The temperature is minus 5 degrees
5 <- The town has 5 thousand people
7 <- She has 18 eggs (7 per box).
7 <- She has 18 (7) eggs.
8 <- There were 8, later 9 of them.
24 <- It takes a 24-hour day
2 <- It is 2^3 in all
3 <- Its value is x^3 here
7 <- First 7. The answer is 8.
8 <- It is 7 or 8. Final Answer: (7, 8)
12 <- The slope is 12x here
3 <- The result is 0.3
3 <- He came 3rd in it
# values of one name
(-3,3) <- x=-3 or x=3
(2,5) <- x=2, x=5
[2,5] <- x=2 or x=5
(2,5) <- 2, 5
(1,2) <- x=1, y=3
(2,1) <- x=1, y=2
(5,7) <- p=5; p=7
# words after a number
5 <- 5 thousand
3 <- 3 fifths
5 <- 5 and a half
7 <- 7th
5 <- 5 squared
5 <- 5 to 1
5 <- 5 dozen
5 <- 5 out of 7
5 <- 5 below zero
2 <- 2 thirds
5 <- 5 million
7 <- 7 mod 3
5000 <- 5 hundred
1/2 <- 1 half mile
B) 3 neutrons <- 3 protons
B) 3 neutrons <- 3
C) 30 miles north <- 30 miles south
C) 30 miles <- 30 km
12 cm <- 12 km
12 cm <- 12 cm^2
12\text{ square feet} <- 12 feet
8 meals <- 8 boxes
\$5 <- 5 cents
5am <- 5
5pm <- 5 am
5 <- 5 o'clock
# colons
1:2:3 <- 1:6
3:20 <- 6:40
1:2 <- 2:1
1:2:3 <- 1:2
1:2 <- 0:0
12 <- Final Answer: The total is:⏎12 or 13
7 <- So \boxed{7}. Final Answer: The sum is:
7 <- Final Answer: Note:⏎7 is wrong
3:5 <- \boxed{0:0}
1:2:3 <- 0:0:0
1/2 <- 1:2
5 <- 5:1
10:30 <- 5:15
2:3 <- 3:4
3 <- 3:00
# the last statement
5 <- Each tray holds \boxed{5} eggs. So the answer is 30.
5 <- <think>perhaps \boxed{5}</think> The answer is 7.
5 <- <think>The answer is 5.</think> Final Answer: 7
5 <- So \boxed{5}.⏎⏎#### 30
5 <- perhaps \boxed{5}</think>7
3 <- Final Answer: 3⏎No.⏎Final Answer: 4
# small
x+1 <- a x + 1
cos x <- a cos x
x=y=2 <- x=2
2 <- x=y=2
x=5 <- y=5
3 <- x+y=3
5 <- x = 5 = 7
5 <- x = 2 = 5
12 <- 3 \times 5 = 12 = 12
12 <- 11 = 12 = 12
0.34 <- x = \frac13 \approx 0.34
0.5 <- x = \frac13 \approx 0.5
(1,2) <- (2,1)
[1,2) <- (1,2]
1,2,3 <- 1, 2
x > 2 <- x \ge 2
x <- \sqrt{x^2}
a^2+b^2 <- (a+b)^2
5 <- 5x
\begin{pmatrix}1&3\\2&4\end{pmatrix} <- \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} <- \begin{pmatrix} 1 & 2 \end{pmatrix}
1011_2 <- 1011_3
52_8 <- 8
25 <- 26%
odd <- not odd
odd <- odds
no <- on
5 <- I do not know.
5 <- NaN
5 <- 1/0
x <- 1e400
42_7 <- 30
# all kinds once more
y=3x <- \cos 0=1
a=b <- 2=2
y=x^2 <- 0=0
x+y=1 <- e^0=1
y=2 <- \sqrt{4}=2
x \ge 1 <- 2 \ge 1
2x=4 <- 1=2
x=7 <- 0x=0
0 <- 1/10^{40}
0 <- 2^{-80}
0 <- e^{-60}
1 <- 1+10^{-18}
1 <- 1-3^{-50}
10^{30} <- 10^{30}+1
\sqrt{2} <- \sqrt{2+10^{-20}}
2 <- \sqrt{4+10^{-25}}
1 <- \cos(10^{-12})
0 <- \sin(10^{-20})
\pi <- \pi+10^{-25}
0.1 <- 0.1+10^{-30}
1/3 <- 0.33333
2/3 <- 0.6667
100 <- 99.9999999999
0.\overline{45} <- 0.\overline{54}
0.\overline{6} <- 0.6
0.\overline{6} <- 0
0.\dot{3} <- 0.\dot{6}
3\pmod7 <- 7\pmod3
3 \bmod 7 <- 7 \bmod 3
2 \pmod 5 <- 2
a\oplus b <- b \ominus a
\vec{a} <- a
\hat{x} <- x
\underline{12} <- \underline{21}
12 <- \underline{1}2
\overline{AB} <- \overline{BA}x
\alpha <- \beta
3 \star 4 <- 4 \star 3
A-a <- a-A
M/m <- m/M
xX^2 <- Xx^2
V=IR <- v=ir
2R+r <- 2r+R
\frac{N}{n} <- \frac{n}{N}
P(A) <- p(a)
ABC <- abc
Gg <- gg
1 <- 1. First add.⏎2. Then stop.
1 <- 1: add 3 and 4
3 <- 3) 8
3 <- 3. 8
3 <- (3) 8
2 <- 2 - 9
4 <- 4 : 9
A) sun <- A or B
A) sun <- A, C
A) sun <- A) sun and B) moon
A) sun <- A) sun, B) moon
A) sun <- A. The moon is not. B is.
A) sun <- A. First, consider each option.
A) sun <- A) moon
A) sun <- A and B are both right
A) sun <- A B C D
A) sun <- ABCD
A) sun <- A-D
A) sun <- A to D
A) sun <- All of A to D
A) sun <- A sun-like star
A) sun <- A (moon)
A) sun <- A) sun. B) moon. C) star.
A) sun <- Final Answer: A) sun or maybe B) moon
A) sun <- The answer is not A
A) sun <- neither A nor B
A) sun <- Not A.
A) sun <- anything but A
A) sun <- I think A or C
A) sun <- A is wrong
A) sun <- A is not correct
A) sun <- B) sun
A) sun <- A, B, C and D
C) star <- See: the star
B <- B or C
7 <- it wasn't 7
7 <- It is no longer 7
7 <- It was 7, now it is 9
7 <- The answer is never 7.
7 <- the answer cannot be 7
7 <- it is between 7 and 9
7 <- at least 7
7 <- at most 7 people came
7 <- less than 7
7 <- it is less than 7
7 <- It is greater than 7
7 <- It exceeds 7 in value
7 <- there are over 7 of them
7 <- under 7 are left
7 <- it is roughly 7
7 <- It is approximately 7
7 <- approximately 7
7 <- about 7
7 <- around 7 or so
7 <- maybe 7
7 <- it may be 7
7 <- It might be 7
7 <- it should not be 7
7 <- unlikely to be 7
7 <- not 7
7 <- 7?
7 <- 6 to 8, so 7 or so
7 <- anything but 7
7 <- any number except 7
7 <- we rule out 7
7 <- 7 is incorrect
7 <- The answer 7 is wrong
7 <- if it is 7, fine
7 <- Final Answer: not 7
7 <- Final Answer: 7 or 8
7 <- Final Answer: either 7 or 8
7 <- Final Answer: less than 7
7 <- Final Answer: 7 is too small
7 <- Final Answer: it lacks 7
8 <- The balance is -$8.
8 <- The balance is minus 8 dollars
8 <- He owes 8 dollars, so he has negative 8
1/4 <- They ate a total of 1 1/4 pizzas.
4 <- They ate a total of 1 1/4 pizzas.
8 <- The probability is 3/8.
3 <- The probability is 3/8.
3 <- The probability is \frac{3}{8}.
3 <- The area is 5√3.
5 <- The area is 5√3.
4 <- The angle is π/4 radians
3 <- He has 12 marbles left after 3 days
2 <- The exponent form is 10^2 here
10 <- The exponent form is 10^2 here
5 <- The value is 5x in there
5 <- The value is x+5 in there
5 <- the point is (5, 6) there
5 <- The number is 5,000 in all
5 <- The number is 5.5 in all
5 <- It is 15% - 5% in all
3 <- She finished 3rd today
20 <- It was the 20th day
6 <- It has a 6-sided die in it
2 <- the formula is H2O in fact
12 <- He sold 12 (of 30) eggs and kept the 18
(-2,2) <- x = \pm 2
(-2,2) <- x=2 or x=-2
(1,4) <- y=1, y=4
[1,4] <- t=1, t=4
(0,1) <- x=0, x=1
5 <- 5 hundred
5 <- 5 tenths
5 <- 5 and a quarter
5 <- 5 point two
5 <- 5 cubed
5 <- 5 factorial
5 <- 5 percent of 60
5 <- 5 less than 9
5 <- 5 more than 9
5 <- 5 times 4
5 <- 5 over 7
5 <- 5 by 7
5 <- 5 plus 2
5 <- 5 minus 2
5 <- 5 or so
5 <- 5 remainder 2
5 <- 5 R 2
5 <- 5th
5 <- fifth
5 <- 5 pm
5 <- 5 a.m.
5 <- 5:00
5 <- 5:30
5 <- 5 degrees below zero
A) 4 protons <- 4 electrons
A) 4 protons <- 4
A) 20 km east <- 20 km west
A) 5 cm <- 5 m
A) 5 times larger <- 5 times smaller
A) increase by 10% <- decrease by 10%
A) 10% increase <- 10% decrease
A) 10% increase <- 10%
A) two days <- two weeks
10 km <- 10 miles
10\text{ apples} <- 10 pears
3:4 <- 0.75
2:3:4 <- 2:12
2:3:4 <- 2:3
9:15 <- 18:30
9:15 <- 3:5
12:00 <- 12
6 <- \boxed{6} eggs fit, so the answer is 12.
6 <- \boxed{6}⏎⏎Answer: 12
6 <- \boxed{6}⏎#### 12
6 <- The answer is 6. Wait, the answer is 12.
6 <- Final Answer: 6⏎Final Answer: 12
6 <- <think>\boxed{6}</think>\boxed{12}
6 <- <think>Final Answer: 6</think>I do not know.
6 <- <think>6</think>12
x+2 <- a x + 2
2x <- a 2x
x=y=5 <- x=5
x=y=5 <- y=5
a=b=c=1 <- a=1
6pm <- 6
7 am <- 7
6 pm <- 6 am
1/2 <- 1 : 2
0.5 <- 1:2
(3,4) <- 3,4
(3,4) <- [3,4]
3,4 <- 3
3 <- 3,4
\{1,2\} <- (1,2)
1.5 <- 1,5
1000 <- 1,00
12 <- 1 2
12 <- 1,2
12 <- 12 12
12 <- 12; 13
12 <- 12/1/1/2
12 <- 12 \approx 13
12 <- \approx 12.4
\sqrt{5} <- 2.236
x <- xx
x <- x x
6 <- 6 thousand
6 <- 6k
6 <- 6x
6 <- 6i
6 <- 6\pi
6 <- 60
6 <- 6^2
6 <- 6/2
6 <- 6.1
6 <- 6 and 7
6 <- -6
6 <- 6!
6 <- |6|x
6 <- \sqrt{6}
6 <- \log 6
6 <- 6_8
6 <- x>6
6 <- x\ne 6
6 <- x \approx 6.4
6 <- (6
6 <- 6)7
6 <- (6,6)
6 <- \{6,7\}
6 <- 6:1
6 <- 6=7
6 <- 6<7
6 <- 3+4
6 <- 2*4
6 <- 6+0.5
6 <- Final Answer: six point six
6 <- VI
6 <- Final Answer:
6 <- Final Answer: unknown
6 <- Final Answer: 6 7
6 <- Final Answer: 6, no 7
6 <- Final Answer: 6/7
6 <- Final Answer: 6 - 1
6 <- Final Answer: 6 of 7
6 <- Final Answer: 6 out of 7
6 <- Final Answer: 6 in 7
6 <- Final Answer: x+6
6 <- Final Answer: 6 more than x
6 <- Final Answer: 6 each, so 12
6 <- Final Answer: 6 × 2
6 <- Final Answer: 6 times 2
6 <- Final Answer: 6 squared
6 <- Final Answer: 6 tens
6 <- Final Answer: 6 dozen
6 <- Final Answer: 6 percent of 50
6 <- Final Answer: 6 to the power of 2
6 <- Final Answer: 6 divided by 2
6 <- Final Answer: 6 plus
6 <- Final Answer: 6+
6 <- Final Answer: >6
6 <- Final Answer: 6...
6 <- Final Answer: 6…7
6 <- Final Answer: 5 < 6
6 <- Final Answer: 6 > 5
6 <- Final Answer: 6 is the wrong answer
6 <- Final Answer: 6 was my first guess, but it is 7
6 <- Final Answer: I first got 6 but then 7
6 <- Final Answer: 6 girls and 7 boys
6 <- Final Answer: from 6 to 7
6 <- Final Answer: the sixth
6 <- Final Answer: 6th
6 <- Final Answer: page 6-7
6 <- Final Answer: 6'5"
6 <- Final Answer: 6 ft 5 in
6 <- Final Answer: 6 hours 30 minutes
6 <- Final Answer: 6h30
6 <- Final Answer: 6:30
6 <- Final Answer: $6.50
6 <- Final Answer: 6 dollars and 50 cents
6 <- Final Answer: 6 and 1/2
6 <- Final Answer: 6 1/2
6 <- Final Answer: 6½
6 <- Final Answer: 6 + \frac12
6 <- Final Answer: it is six, i.e. 5
6 <- Final Answer: the difference of 6 and 7
6 <- Final Answer: the product of 6 and 2
6 <- Final Answer: the sum of 6 and 2
6 <- Final Answer: the square of 6
6 <- Final Answer: the square root of 6
6 <- Final Answer: half of 6
6 <- Final Answer: twice 6
6 <- Final Answer: double 6
6 <- Final Answer: a third of 6
6 <- Final Answer: one more than 6
6 <- Final Answer: the log of 6
6 <- Final Answer: the reciprocal of 6
6 <- Final Answer: the negative of 6
6 <- Final Answer: the inverse of 6
6 <- Final Answer: the factorial of 6
6 <- Final Answer: a multiple of 6
6 <- Final Answer: a factor of 6
6 <- Final Answer: divisible by 6
6 <- Final Answer: step 6
6 <- Final Answer: question 6 has no answer
6 <- Final Answer: option 6 of all
6 <- Final Answer: there is no 6
6 <- Final Answer: no idea, 6 is what I had
D) a dog <- D) a cat
D) a dog <- C) a dog
D) a dog <- D) a dog and a cat
D) a dog <- D) a dog house
D) a dog <- dog house
D) a dog <- not a dog
D) a dog <- a dog or a cat
D) a dog <- C
D) a dog <- D or C
D) a dog <- D, or perhaps C
D) a dog <- D, then C
D) a dog <- C, D
D) a dog <- I would say C, not D
D) a dog <- C is right, D is wrong
D) a dog <- D: a cat
D) a dog <- D is tempting but C
D) CO2 <- CO
D) CO <- Co
D) Aa <- AA
D) 5 <- 6
D) 5 cm <- 5 km
D) 10 to 20 <- 10 to 30
D) 3 times <- 3
D) 1/2 <- 1/3
D) 5 protons <- 5 neutrons
D) 5 red balls <- 5 blue balls
D) 5 red balls <- 5
# beside a box
7 <- The answer is not \boxed{7}.
7 <- \boxed{7} is incorrect.
7 <- Final Answer: -\boxed{7}
7 <- \boxed{7} million
7 <- $\boxed{7} \times 10^3$
7 <- $\boxed{7}x$
7 <- $\frac{1}{\boxed{7}}$
7 <- $\boxed{7}^2$
7 <- $1\boxed{7}$
7 <- $\boxed{7}.5$
7 <- $\boxed{5} - \boxed{7}$
7 <- Final Answer: 8⏎\boxed{7}
7 <- Final Answer: 8 or \boxed{7}
7 <- \boxed{7} or 8
# an announced sentence with one number, which says something else
7 <- Final Answer: Ann lacks 7 eggs
7 <- Final Answer: Nobody bought 7 eggs
7 <- Final Answer: Ann wants at least 7 eggs
7 <- Final Answer: The hens laid 7 dozen eggs
7 <- Final Answer: Ann ate 7 thirds of it
7 <- Final Answer: Ann sold all but 7 eggs
7 <- Final Answer: Ann paid 7 cents
7 <- Final Answer: Ann bought 7 eggs fewer than Ben has
7 <- Final Answer: Ann walks nearly 7 miles
7 <- Final Answer: Tom hiked past mile 7 or 8
7 <- Final Answer: On day 7, Ann has twenty eggs
7 <- Final Answer: Ann made eighty dollars selling 7 eggs
7 <- Final Answer: Ann has 7 eggs and Tom has nine
7 <- Final Answer: Ann hopes for a total of $7
7 <- Final Answer: The jar holds two point 7 liters
7 <- Final Answer: Ann has 7 eggs⏎Double that.
7 <- Final Answer: 7 (times ten)
7 <- \boxed{7} (off by one)
7 <- 7 forty cent stamps
7 <- Final Answer: 7 (28 with the guests)
7 <- \boxed{7}, which we double to get 14
# taken back
7 <- Final Answer: 7⏎No, 8.
7 <- Final Answer: 7. This is wrong.
7 <- The answer is 7? No, 8.
7 <- Final Answer: 7. Or 8.
7 <- Final Answer: $$7$$ or $$8$$
7 <- Final Answer: \[7\]+1
C <- <answer>C</answer> or D
# a letter that is not chosen alone
C <- Final Answer: C is correct and so is D
C <- Final Answer: C since all are right
C <- Final Answer: C, wrong
C <- Final Answer: C (not sure)
C <- Final Answer: C, none of the above
B) a ferry <- Final Answer: B because B is wrong
B) a ferry <- Final Answer: B not A but C
B) a ferry <- Final Answer: A: a ferry
# words that make another number
7 <- 7 trillion
7 <- 7 twelfths
7 <- 7 seventy
7 <- 7 hundredfold
7 <- 7 doubled
7 <- 7 rejected
7 <- 7 possibly
7 <- 7 per thousand
7000 <- 7 per thousand
12 miles per hour <- 12 hours per mile
12 cm <- 12 cubic cm
12 cm <- The area is 12 square cm.
# a statement about something else, or denied before
7 <- I do not think the answer is 7.
7 <- Suppose the answer is 7.
7 <- The wrong answer is 7.
7 <- The answer is not: 7
7 <- Twice the answer is 7.
7 <- The answer plus 3 is 7.
7 <- The last digit of the answer is 7.
7 <- The answer is prime, like 7.
7 <- The answer is 7 and a bit.
18 <- 18 is an extraneous solution.
18 <- The upper bound is 18.
(2,5) <- The interval excludes (2,5).
7 <- I don't believe that the answer is 7.
7 <- Another answer is 7.
7 <- They think that the answer is 7.
7 <- The number of digits of the answer is 7.
7 <- The answer is a number whose last digit is 7.
7 <- The answer has 7 digits.
7 <- It is 5. Or it is 7.
7 <- It is 5. It is 6. It is 7.
18 <- 18 fails.
18 <- It is a lie that it is 18.
18 <- Candidates: 18
18 <- The total is 18 and
\frac{1}{2} <- The probability is 1/2 percent.
\frac{1}{2} <- The probability is 1/2 of that.
2x+1 <- The factors are x and 2x+1.
(2,5) <- The circle with center (2,5).
# a second answer on the next line, or in the next few words
7 <- Final Answer: 7⏎8⏎9
7 <- Final Answer: 7⏎x = 8
7 <- Final Answer: 7. Actually 8.
7 <- Final Answer: 7. It is 8.
7 <- Final Answer: 7 (or 8)
7 <- Final Answer: \boxed{7}⏎\boxed{8}
7 <- \boxed{7}. Wait, it is 8.
7 <- \boxed{8} \boxed{7}
7 <- \boxed{7}, or 8
7 <- <answer>7</answer>⏎8
B) a ferry <- Final Answer: B) a ferry⏎C) a tram
# a relation, a digit or a doubt beside a box
7 <- $x > \boxed{7}$
7 <- $x \ne \boxed{7}$
7 <- $0.\boxed{7}$
7 <- \boxed{7},000
7 <- (\boxed{7}, 8)
7 <- at least \boxed{7}
7 <- \boxed{7} was my first guess
7 <- $\boxed{-}\boxed{7}$
# an option taken back, or one of several
B) a ferry <- Final Answer: B, not B
B <- B is best avoided
B <- B because C
B <- B: the others too
B) 3 <- C is 3
B) 3 <- Option A: 3
# units that are none, or other ones
7 <- 7 upper bound
7 <- 7 apples/hundred
7 <- 7 fewer apples
7 <- 7 too few eggs
7 <- 7 digits
\$50 <- 50 cm
\$50 <- 50%
\frac{1}{2} <- 0.5%
2 hours and 30 minutes <- 30 and 2
# names and values that do not belong together
x=2, y=5 <- 5, 2
x=2, y=5 <- x=2 or y=5
(2,5) <- (y,x)=(2,5)
12 <- half = 12
12 <- N_{not}=12
5 <- 6 \in 5
5 <- 7 = 8 \in 5
12 <- answer/two = 12
# infinity is no number, and what a sum swallows is no zero
1 <- \frac{\infty}{\infty}
1 <- 1^\infty
0 <- \infty-\infty
0 <- e^{-300}
1 <- 1+e^{-300}
# cut off, or a sign before
18 <- So she earns 18 ×
18 <- The total is 18/
18 <- The answer is 3 * 6 = 18 *
7 <- ~7
7 <- 3+4\mathrm{i}
12 <- \text{wrong answer} = 12
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{vmatrix}1&2\\3&4\end{vmatrix}
# parts, numbers and units of other kinds
5 <- 5 fourths
5 <- 5 millionths
5 <- 5 seventeen miles
5 <- 5 minutes of 60
5 months <- 5 weeks
5 sec <- 5 min
# commas of a list between digits
(1,200) <- 1200
[1,200] <- 1200
[1,200] <- (1200)
{1,200} <- 1200
\{1,200\} <- 1200
(1,200,300) <- 1200300
(x+1,200) <- x+1200
1,2,300 <- 2300,1
1,200,3 <- 3, 1200
# anagrams, and formulas of chemistry
constant <- \pi
2\pi <- 2 constant
cat <- act
war <- raw
pay <- yap
DNA <- AND
ABC <- BCA
HT <- TH
B) rat <- tar
B) HT <- TH
NO2 <- N2O
B) NO2 <- N2O
H2O <- HO2
CO2 <- C2O
2x <- x2
# taken back by what follows
35 <- $\boxed{35}$ is what I got first, but after rechecking the total is $42$.
35 <- \boxed{35}⏎⏎However, this ignores the tip. With the tip the answer is 42.
35 <- Final Answer: 35. But that ignores the tip, so 42.
35 <- The answer is 35. However, with the tip it is 42.
7 <- $\boxed{7}\sqrt{2}$
7 <- $\boxed{7}\pi$
# scales and digits
9 <- Final Answer: 9 crore rupees
9 <- 9 lakh people
# an explanation in brackets that speaks of another option
B) a ferry <- B) a ferry (or C)
B) a ferry <- B) a ferry (not A)
B) a ferry <- B) a ferry (C)
B) a ferry <- B (a tram)
B) a ferry <- B) a tram (a ferry)
B) a ferry <- A) a ferry (a boat)
30 km/h <- 30 km
x/h <- x
# boxes in boxes
5 <- -\boxed{\boxed{5}}
5 <- \boxed{2\boxed{5}}
5 <- \boxed{\boxed{5}}^2
5 <- \boxed{ \boxed{5} }x
# a name on the right gives no other value, and even roots of negative numbers
5 <- 5 = 6 = x
5 <- 6 = x
x=5 <- 5=y
5 <- 5 \approx x
2 <- \sqrt[3]{-8}
2 <- \sqrt[4]{-16}
-2 <- \sqrt{-4}
4 <- -(-8)^{2/3}
x <- \sqrt[4]{x^4}
# disbelief before the verb of a box, an objection after it
7 <- Tom claims that it is \boxed{7}.
7 <- We do not think that it is \boxed{7}.
7 <- If it rained, the number would be \boxed{7}.
7 <- The side is twice \boxed{7}.
7 <- It might be \boxed{7}.
7 <- It is a lie that it is \boxed{7}.
# taken back, or overruled by a conclusion
6 <- $\boxed{6}$⏎⏎Let me double-check. 4 and 5 are 9, not 6. So it is 9.
6 <- $\boxed{6}$⏎⏎On second thought, the sum should be 9.
6 <- Final Answer: 6. I apologize, the correct total is 9.
6 <- Final Answer: 6⏎⏎Hold on. It's 9.
6 <- Final Answer: 6. Strike that. 9.
6 <- The answer is 6. Re-evaluating: 9.
6 <- Final Answer: 6⏎⏎Looking back, I misread a number. There are 9.
6 <- If two more came, the answer would be 6. They did not.
6 <- Each box holds $\boxed{6}$ pens.⏎⏎Now we multiply by the number of boxes. So there are 12 pens.
6 <- $\boxed{6}$; however, with the tip it is 9.
6 <- Final Answer: 6. We must add the tip. We get 9.
6 <- Final Answer: 6⏎⏎Check: 6 / 2 = 3, so it should be 9.
B) a ferry <- Final Answer: B) a ferry⏎⏎Final choice: C) a tram
B) a ferry <- The answer is B.⏎⏎B) is wrong because it floats.
# a word after a box that makes another number
7 <- $\boxed{7}$ tenths
7 <- $\boxed{7}$ hundredths
7 <- \boxed{7} squared
7 <- $\boxed{7}$ out of $9$
7 <- \boxed{7} plus 2
7 <- $\boxed{7}$ times $3$
7 <- $\boxed{7}$ and a half
7 <- $\boxed{7}$ $\frac{1}{2}$
7 <- \boxed{7} lakh
# more words that are no units
4 <- 4 twenties
4 <- 4 nines
4 <- 4 sixes
2 <- 2 score years
2 <- 2 gross pens
5 <- 5 mil dollars
53 <- 5$3
53 <- 5\$3
# thoughts in other tags
7 <- [THINK]\boxed{7}[/THINK] It is 8.
7 <- <thinking>\boxed{7}</thinking>⏎All pens in the box together are 8.
7 <- <|channel|>analysis<|message|>The answer is 7.<|channel|>final<|message|>All of the pens are 8.
# a value of something else
7 <- So 2x is 7.
7 <- x + y is 7.
7 <- 3(x + 2) equals 7.
7 <- $3x$ equals $7$.
7 <- So the number multiplied by 3 is 7.
7 <- So the number less 3 is 7.
7 <- The unknown times 4 is 7.
7 <- She wishes she had 7.
7 <- She almost has 7.
7 <- She used to have 7.
7 <- She hopes to sell 7.
7 <- She pretends to have 7.
16 <- She needed 132 spoons of flour to make 16 muffins.
16 <- She had 12 left when she bought 16.
A <- 正确答案是B。错误答案：A
7 <- The answer is 7? Let me see. The total is 8.
6 <- Final Answer: 6⏎⏎With the last three, the answer we want is 9.
6 <- Final Answer: 6⏎⏎Then we add 3 more to get 9.
1 <- 1 incorrect
1 <- 1 maybe
1 <- 1 half
5 <- 5 percent of people
5 <- 5 cents of change
5 <- 5 tens of apples
B) a ferry <- B) a ferry, which is wrong.
B) a ferry <- B) a ferry, where C is better.
B) a ferry <- I would choose C) a tram over B) a ferry.
42 <- Final Answer (not in dollars): 42
(1,2,3) <- \langle 3,2,1\rangle
\begin{pmatrix}1&2\end{pmatrix} <- \langle 1,2\rangle
5 <- 5 halves of melons
5 <- 5 groups of ten
0.5 <- 0.5 percent of people
42 <- Total: 42 and 7
42 <- Result: not 42
42 <- Total: 6 × 7 = 40
# a denial of the verb before a box
7 <- It cannot be \boxed{7}.
7 <- It never equals \boxed{7}.
7 <- $x$ is not equal to $\boxed{7}$.
7 <- If it is \boxed{7}, we get a contradiction.
7 <- I wonder whether it is \boxed{7}.
7 <- Without the tip it is \boxed{7}.
7 <- One could get \boxed{7} by mistake.
7 <- We rule out \boxed{7}.
7 <- There is no reason that it is \boxed{7}.
7 <- \boxed{7} less than 9
7 <- \boxed{7} to 9
7 <- \boxed{7}⏎⏎Note: 8.
7 <- Final Answer (in thousands): 7
7 <- Thus $\frac{x}{2}$ is 7.
7 <- So |x| is 7.
7 <- She thinks she has 7.
7 <- She wants to have 7.
7 <- It nearly comes to 7.
7 <- 错的答案：7
1 <- 1 remainder
1 <- 1 kilo
B) a ferry <- B) a ferry, which I doubt.
# a note that states another value
7 <- Final Answer: 7. Note that the answer is 8.
7 <- Final Answer: 7⏎⏎Note: the answer is 8.
7 <- \boxed{7}. Note that the total is 8.
7 <- Final Answer: 7. In fact it is 8.
7 <- Final Answer: 7. So the answer would be 8.
# verbs that deny, numbers that are no object of a verb, a second one
7 <- The set excludes 7.
7 <- We reject 7.
7 <- It takes 5 hours and 7 minutes
7 <- 6 hours 7 minutes
7 <- We add 7.
7 <- She should have sold 7 cups.
7 <- He supposedly sold 7 cups.
7 <- Then she subtracts 7 apples.
7 <- We multiply by 7.
7 <- He starts with 7.
7 <- The answer is unlikely to be 7
7 <- The answer is 7 in the tens place.
7 <- It happens 7 in 9 times.
# letters that are units only at the end, after a space
8 <- 8m
8 <- 8 m + 2
8 <- 8 g - 1
5 <- 5m^2 + 3m
8 g <- 8 m
8 L <- 8 g
\$8 <- €8
8 <- €8.50
a \circ b <- b \circ a
# several statements in a sentence, of which the last counts for none
7 <- Final Answer: The width is 5 and the length is 7.
7 <- Final Answer: Ann has 5, Ben has 7
# who did not do it, or only tried, or does so seldom; verbs that state no amount
7 <- Final Answer: He refused to pay $7.
7 <- Final Answer: It is impossible to get 7 books.
7 <- Final Answer: Whoever sold 7 books wins.
7 <- Final Answer: He hardly sold 7 books.
7 <- Final Answer: We removed 7 cases.
# a box that its sentence goes on from, a function or a letter beside one
7 <- There are \boxed{7}, so the total is 28.
7 <- We get \boxed{7} per row, which makes 28.
9 <- \boxed{9} (this is only the first part; the full answer is 18)
7 <- \boxed{7} Hmm, that is off by one: 8
7 <- $\log_{10} \boxed{7}$
7 <- $2 \boxed{7}$
7 <- $\boxed{7}\,x$
7 <- $\boxed{7} \le x$
# a later statement of another value, and what was forgotten
7 <- Final Answer: 7⏎⏎Two rows of 7 give \boxed{14}.
7 <- Final Answer: 7⏎⏎The answer to the question: 14.
B) iron <- Final Answer: B) iron⏎⏎Answer: C) wood
7 <- Final Answer: 7⏎⏎I forgot the guests. There are 9.
7 <- Final Answer: 7⏎$\frac{1}{2}$
"""

# Equal in truth, not seen: kept here so that a change of mind about one of them shows
NOT_SEEN = r"""
x_{1}+x_{2} <- x₁ + x₂
\infty <- infinity
\emptyset <- \{\}
5\% <- 0.05
0.05 <- 5\%
1/2 <- 50%
1/4 <- 25%
1-\sqrt2, 1+\sqrt2 <- 1 \pm \sqrt2
-2,2 <- x = \pm 2
[-2,-1]\cup[1,2] <- 1 \le |z| \le 2
30_{10} <- 42_7
7 <- seven
\frac{\pi}{3} <- 60^\circ
\begin{pmatrix}2&2\end{pmatrix} <- \begin{pmatrix}1&2\end{pmatrix}+\begin{pmatrix}1&0\end{pmatrix}
6 <- \sum_{k=1}^{3} k
120 <- 5!
1:2 <- 3:6:9
7 <- 7th
1/2 <- half
C) a magnet <- C. It attracts iron.
(1+i)(1-i) <- 2
5 <- \log_2 32
harbour <- the harbour
8\text{ square inches} <- 8 inches^2
15 <- So he pays 15% of it
12 <- In total, 12 people came
0.33 <- x=\frac13\approx0.33
6 <- f(2) = 6
3 <- 3 \text{ and } 3
5 <- 5 = x
5 <- \boxed{\boxed{5}}
-2 <- \sqrt[3]{-8}
B) a ferry <- The answer is **B**.⏎⏎A) is wrong because a tram needs rails.
8m <- 8 m
"""


def pairs(table):
    lines = [line for line in table.strip().splitlines() if not line.startswith("# ")]
    return [line.replace("⏎", "\n").split(" <- ") for line in lines]


def test_a_whole_solution_of_gsm8k_as_gold_answer():
    gold = "He has 3 + 4 = 7 apples.\n#### 1,007"
    assert grade("Final Answer: 1007", gold) and not grade("Final Answer: 7", gold)


@pytest.mark.parametrize("gold, response", pairs(EQUAL))
def test_equal(gold, response):
    assert grade(response, gold) and reward(response, gold) == 1


@pytest.mark.parametrize("gold, response", pairs(DIFFERENT))
def test_different(gold, response):
    assert not grade(response, gold) and reward(response, gold) == -1


@pytest.mark.parametrize("gold, response", pairs(NOT_SEEN))
def test_known_false_negative(gold, response):
    assert not grade(response, gold), "seen as equal now: move it to EQUAL"


UNCHANGED = {}  # numbers altered without a change of value


@pytest.mark.parametrize("gold", sorted({gold for gold, _ in pairs(EQUAL) + pairs(DIFFERENT)}))
def test_every_gold_equals_itself_and_no_altered_number(gold):
    assert is_equiv(gold, gold) and grade(f"So it is done. Final Answer: {gold}", gold)
    digits = [i for i, c in enumerate(gold) if c.isascii() and c.isdigit()]
    for i in digits:
        altered = f"{gold[:i]}{(int(gold[i]) + 1) % 10}{gold[i + 1:]}"
        if altered not in UNCHANGED:
            assert not is_equiv(altered, gold) and not is_equiv(gold, altered), altered


RESPONSES = [
    ("Half of 8 is 4.\n\nFinal Answer: 4", "4"),
    ("**Final Answer**: The answer is $\\frac{1}{2}$. I hope this helps.", r"$\frac{1}{2}$"),
    (r"We get \boxed{3}, wrong; so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
    (r"Either \boxed{3} or \boxed{5} will do.", "3, 5"),
    ("She keeps 7 - 2 = 5 of them.\n#### 5", "5"),
    ("#### Step 1\nWe add.\nSo the answer is 12 apples. Done.", "12 apples"),
    ("At first C looks right, but the answer is (B).", "(B)"),
    ("Answer: $$\n\\frac{2}{3}\n$$\nBye.", r"\frac{2}{3}"),
    ("Adding both.\nA: 15", "15"),
    ("The correct option is D.", "D"),
    ("I do not know.", None),
    ("", None),
    ("A cut-off \\boxed{3", None),
]


@pytest.mark.parametrize("response, expected", RESPONSES)
def test_extraction(response, expected):
    assert extract_answer(response) == expected


def test_a_marker_of_ones_own_comes_first():
    response = "Result = 7\nIn the form that was asked for: Final Answer: 8"
    assert extract_answer(response, marker="Result =") == "7" and grade(response, "7", marker="Result =")
    assert extract_answer(response) == "8" and not grade(response, "7")


def test_visible_text_is_what_stands_outside_thoughts():
    assert visible("a<think>b</think>c<think>d</think>e") == "ace"
    assert visible("a<think>b") == "a" and visible("a</think>b") == "b" and visible("ab") == "ab"


@pytest.mark.parametrize("opener, closer", [
    ("<Think>", "</Think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"), ("<|begin_of_thought|>", "<|end_of_thought|>")])
def test_thoughts_between_other_tags(opener, closer):
    assert visible(f"a{opener}b{closer}c") == "ac"
    assert visible(f"b{closer}c") == "c"
    assert opened_thought(f"Add.\n{opener}\n") == opener
    assert opened_thought(f"{opener}{closer}") == ""


def test_a_box_as_marker():
    assert grade(r"So \boxed{\frac{1}{2}}.", "1/2", marker="\\boxed{")
    assert not grade(r"So \boxed{7}.", "8", marker="\\boxed{")


@pytest.mark.parametrize("judge", [grade, is_equiv, reward])
@pytest.mark.parametrize("arguments", [(None, "5"), ("5", None), ("5", 5), (b"5", "5")])
def test_what_is_no_text_is_refused_in_one_sentence(judge, arguments):
    with pytest.raises(TypeError, match="are text"):
        judge(*arguments)
    with pytest.raises(TypeError, match="are text"):
        extract_answer(7)


def test_the_judge_needs_no_torch():
    heavy = {"torch", "transformers", "numpy", "mcts", "tqdm"}
    code = f"import sys, eval; print(*sorted({heavy} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == ""


N = 100_000
HOSTILE = [
    "7" * N, "7" * 1500, "9**9**9**9", "9^9^9^9", "9^{9^{9^{9}}}", "10^{999999999}", "(2^{2000})^{2000}",
    "1e400", "1e999999999",
    "9!!!!!!", "9" + "!" * N, r"\binom{1000000}{500000}", r"\sqrt[1000000007]{5}", "e^{e^{e^{e^{e}}}}", "1/0",
    "0^{-1}", "x/(y-y)",
    "x = 10^{400}", "10^{400}x < 10^{-400}", "\\pi^{-600}x = 10^{400}",
    "a" * 50_000, "ab " * 20_000, "(" * N + "1" + ")" * N, "(" * 190 + "1" + ")" * 190, "{" * N, "}" * N,
    "\\{" * N, "|" * 300,
    "\\boxed{" * N, "\\boxed{" * 2000 + "5" + "}" * 2000, "\\boxed{1} and " * 5000, "\\frac" * 300,
    "\\sqrt" * 300, "sin " * 300,
    "1\\frac{" * 60 + "1" + "}{2}" * 60, "1\\frac{" * 18 + "1" + "}{1}" * 18, "\\pm(" * 30 + "x" + ")" * 30,
    "^".join("2" * 190), "-" * N + "1", "<".join("x" * 190), "1" + ",000" * 20_000, "1,000" * 300, "a_" * 190,
    "\\pm" * 300 + "1",
    ",".join(f"x+{k}" for k in range(90)), ",".join(f"{k}+x" for k in range(90)),
    "+".join(f"(x-{k})^{{399}}/{k}" for k in range(1, 30)), "1\\frac{1}{0}", "10^{400}^\\circ",
    "+".join(f"1/{k}" for k in range(1001, 1190)),
    "Final Answer: " * 8000, "final answer" * 8000, "the answer is " * 8000, "####" * N, "####1" * 20_000,
    "$" * N, "\\(" * N,
    "**" * N, "\\text{" * N, "\\text{a}" * N, "\\begin{pmatrix}" * N, "A) " * N, " " * N, "\n" * N, "\0" * N,
    "5\0", "\ud800",
    "NaN", "nan", "inf", "-inf", "１" * N, "²" * N, "\ufdfa" * N, "e\u0301" * N,
    "__import__('os').system('touch pwned')",
    "open('/etc/passwd').read()", "\\input{/etc/passwd}", "'; DROP TABLE answers; --",
    "<think>" * N, "<answer>" * 20_000, "\\boxed7" * 20_000, "Final Answer\n" * 9000, "final answer " + " " * N,
    "Final Answer: " + "So:\n" * 1000 + "7", "**a" * 30_000, "1:2" * N, "0.\\overline{" + "3" * 1900 + "}",
    "5 " + "million " * 180, "$" * 19_999 + "7", "so, " * 30_000, "answer\n" * 10_000, "\\boxed{7} " * 5000,
    "a" * 1900 + " = 5", "B because " * 300, "Final Answer: 7. " + "b " * 1900, "x=1," * 40 + "y=2",
    "(" * 10_000 + "1,2" + ")" * 10_000, "it is (" * 3000, "it is " + "(1, " * 4000, "it is " + "1 " * 20_000,
    "\u00bd" * 1900, "x\u00b2" * 900, "x=" * 190 + "1", "1≈" * 150 + "1", "5 cm^{(1,2)}", "\\frac", "=;=", "\\{",
    "\\sin^{-1} x", "\\tan 90^\\circ", "\\ln 0", "\\sqrt[0]{5}", "\\boxed\\}", "\\ln 0 = \\ln 0", "2^\\pi",
    "\\sin(x)^" * 40 + "2", "x^{-1/3}" * 40, "\\begin{pmatrix}" * 130,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_input_ends_in_a_verdict_on_either_side(text):
    for other in ("x+1", "B) a ferry", text + "1"):
        for judge in (is_equiv, grade):
            assert judge(text, other) in (True, False)
            assert judge(other, text) in (True, False)
    if len(text) <= answers.MAX_CHARS:
        assert is_equiv(text, text) is bool(text.strip(" \n\0*`\"'$.,;:"))


UNITS = {unit for unit in answers._UNITS if f"{unit}s" in answers._UNITS} - answers._ESSENTIAL - {"%", "°"}


@pytest.mark.parametrize("unit", sorted(UNITS))
def test_every_unit_may_be_missing_and_has_a_plural(unit):
    assert is_equiv(f"5 {unit}", "5") and is_equiv(f"5 {unit}s", "5") and is_equiv(f"5 {unit}", f"5 {unit}s")
    assert not is_equiv(f"6 {unit}", f"5 {unit}")


def test_not_a_number_and_infinity_equal_no_number():
    assert not is_equiv("1\0002", "12") and is_equiv("5\0", "5")
    for text in ("NaN", "inf", "1e400", "9^9^9^9", "1/0"):
        assert not is_equiv(text, "5") and not is_equiv(text, "x")
    assert not is_equiv(r"1e308\pi\cdot 10", r"1e308\pi\cdot 20"), "two overflows are not equal"
    assert not is_equiv(r"1e308\pi x = 1", "x = y")


def test_work_is_bounded(monkeypatch):
    """A reader or an evaluation that ran past its limits would take more steps than these."""
    steps = []
    take = answers._Reader.take
    calculate = answers._calculate
    monkeypatch.setattr(answers._Reader, "take", lambda *args: steps.append(1) or take(*args))
    monkeypatch.setattr(answers, "_calculate", lambda *args, **how: steps.append(1) or calculate(*args, **how))
    answers._parse.cache_clear()
    for text in HOSTILE:
        steps.clear()
        is_equiv(text, "x+1")
        assert len(steps) < 100_000
        group = answers._parse(text)
        assert group is None or depth(group) <= 4 * answers.MAX_DEPTH
        for number in numbers(group):
            assert max(map(int.bit_length, number.as_integer_ratio())) <= answers.MAX_BITS


def depth(node):
    return 1 + max(map(depth, node), default=0) if isinstance(node, tuple) else 0


def numbers(node):
    """All rational numbers in a group, of whatever expression."""
    if isinstance(node, Fraction):
        yield node
    elif isinstance(node, tuple):
        for part in node:
            yield from numbers(part)


def expression(rng, size):
    """A random expression as (text, the same written differently, a different one)."""
    if size == 0:
        number, letter = rng.randint(2, 9), rng.choice("xyz")
        return rng.choice([(f"{number}", rf"\frac{{{3 * number}}}{{3}}", f"{number + 1}"),
                           (letter, f"1{letter}", f"2{letter}")])
    a, a_same, a_other = expression(rng, size - 1)
    b, b_same, _ = expression(rng, rng.randrange(size))
    return rng.choice([
        (f"({a})+({b})", f"{{{b_same}}} + {{{a_same}}}", f"({a_other})+({b})"),
        (f"({a})-({b})", f"-(({b_same})-({a_same}))", f"({a_other})-({b})"),
        (f"({a})({b}+1)", rf"({a_same}) \cdot \left({b_same}\right) + ({a_same})", f"({a_other})({b}+1)"),
        (f"({a})/(7+({b})^2)", rf"\frac{{{a_same}}}{{({b_same})({b_same})+7}}", f"({a_other})/(7+({b})^2)"),
        (f"({a})^3", f"({a_same})^2*({a_same})", f"({a_other})^3"),
    ])


@pytest.mark.parametrize("seed", range(40))
def test_random_expressions(seed):
    text, same, other = expression(random.Random(seed), 3)
    assert is_equiv(text, text) and is_equiv(text, same) and is_equiv(same, text), (text, same)
    assert not is_equiv(text, other) and not is_equiv(other, text), (text, other)


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = list(r"0123456789+-*/^_=<>!|:;,.(){}[]&%' abxyi$~") + [
        "\\frac", "\\sqrt", "\\{", "\\}", "\\\\", "\\pm", "\\cup", "\\in", "\\text{cm}", "\\left(",
        "\\begin{pmatrix}",
        "\\end{pmatrix}", "\\sin", "\\log_", "^\\circ", "\\infty", " and ", "\\boxed{", "Final Answer:", "½",
        "²", "\0"]
    for _ in range(2000):
        left, right = ("".join(rng.choices(pieces, k=rng.randint(1, 25))) for _ in range(2))
        assert is_equiv(left, right) in (True, False) and grade(left, right) in (True, False)
        left, right = f"1+{left}", f"1+{right}"  # no options now, so the two sides are alike
        assert is_equiv(left, right) == is_equiv(right, left)


def test_docstring_examples():
    assert doctest.testmod(answers).failed == 0
